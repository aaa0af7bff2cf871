// Products of a few tokens and a weight stored as a bitmask, on CPUs; called by native.py through ctypes.
//
// Every level of instructions has its own `Simd` type, which expands and multiplies a number of columns at a time. The
// rest is shared. Functions carry their instruction set as an attribute, so that one build runs on every CPU.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifndef FOR_AVX512  // a test compiles these functions for emulated instructions
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt,bmi2")))
#define FOR_AVX512_BF16                                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx512bf16,popcnt,bmi2")))
#endif
#define FOR_AVX2 __attribute__((target("avx2,fma,popcnt,bmi2")))

struct Bfloat16 {
    uint16_t bits;
};

// Layout as passed by native.py. The columns are split into panels, stored one after another. Each panel is stored like
// a separate weight: masks of whole bytes per row, values row by row. `starts` contains the index of the first value of
// every row of every panel, then the number of all values.
struct SparseWeight {
    int64_t rows, columns, panel_columns;  // panel_columns: a multiple of 64, at most PANEL_LIMIT
    const uint8_t* mask;
    const void* values;
    const int64_t* starts;
    const float* scales;  // one per row; null unless the values are int8
    int32_t kind;
};

namespace {

enum Level { PORTABLE, AVX2, AVX512, AVX512_BF16 };
enum Kind { BFLOAT16, FLOAT32, INT8 };
constexpr int64_t PANEL_LIMIT = 8192;
constexpr int64_t OVERREAD = 32;  // values after the end of a row that a vector load may read
constexpr int64_t MOST_TOKENS = 8;  // tokens at a time: their sums fit in the registers
constexpr int64_t ALIGNMENT = 64;
constexpr int INT16_STEPS = 32767;  // steps from zero to a token's largest input

float widen(float value) { return value; }
float widen(int8_t value) { return value; }
float widen(Bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
void narrow(float value, float& result) { result = value; }
void narrow(float value, Bfloat16& result) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    result.bits = is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

int64_t ceiling(int64_t value, int64_t step) { return (value + step - 1) / step; }

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read as little-endian words");

// Mask of the next 64 columns, or of the remaining columns if there are fewer.
inline uint64_t load_mask(const uint8_t* mask, int64_t bytes = 8) {
    uint64_t group = 0;
    memcpy(&group, mask, bytes);
    return group;
}

// Prefetches values into the first-level cache some hundred cycles before they are read, because the CPU's own
// prefetching is late under load. Two cache lines per 64 columns hold all values in bfloat16, and in float32 from 50 %
// zeros on. The address is an integer, because it may lie beyond the array.
inline void fetch_ahead(const void* values) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(values) + 2048;
    __builtin_prefetch(reinterpret_cast<const void*>(ahead));
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + 64));
}

struct Portable {
    static constexpr int step = 64;
    using Input = float;
    using Dense = float;
    template <int TOKENS, class Value>
    static void row(const uint8_t* mask, int64_t columns, const Value* values, const float* inputs, float* totals) {
        float sums[TOKENS] = {};
        for (int64_t bytes = ceiling(columns, 8); bytes > 0; bytes -= 8, mask += 8, inputs += step * TOKENS)
            for (uint64_t bits = load_mask(mask, bytes < 8 ? bytes : 8); bits; bits &= bits - 1) {
                const float value = widen(*values++);
                const float* input = inputs + __builtin_ctzll(bits);
                for (int token = 0; token < TOKENS; ++token) sums[token] += value * input[token * step];
            }
        for (int token = 0; token < TOKENS; ++token) totals[token] += sums[token];
    }
    template <class Value>
    static void unpack_row(const uint8_t* mask, int64_t columns, const Value* values, float scale, float* row) {
        memset(row, 0, columns * sizeof(float));
        for (int64_t bytes = ceiling(columns, 8); bytes > 0; bytes -= 8, mask += 8, row += step)
            for (uint64_t bits = load_mask(mask, bytes < 8 ? bytes : 8); bits; bits &= bits - 1)
                row[__builtin_ctzll(bits)] = widen(*values++) * scale;
    }
};

#if defined(__x86_64__)

// For every mask of 8 columns: the position of each column's value among the next 8 stored values.
struct Tables {
    uint8_t words[256][32];  // byte shuffles that leave a bfloat16 in the upper half of a 32-bit lane, ...
    uint8_t bytes[256][32];  // an int8 in its highest byte, ...
    uint32_t lanes[256][8];  // and a lane permutation for float32, with the sign bit where a value is stored
    constexpr Tables() : words(), bytes(), lanes() {
        for (int mask = 0; mask < 256; ++mask)
            for (int column = 0, next = 0; column < 8; ++column) {
                const bool stored = mask >> column & 1;
                for (int byte = 4 * column; byte < 4 * column + 4; ++byte) words[mask][byte] = bytes[mask][byte] = 0x80;
                if (!stored) continue;
                words[mask][4 * column + 2] = 2 * next;
                words[mask][4 * column + 3] = 2 * next + 1;
                bytes[mask][4 * column + 3] = next;
                lanes[mask][column] = 0x80000000u | next++;
            }
    }
};
alignas(ALIGNMENT) constexpr Tables TABLES;

// Loops over the columns of a row, in groups of 64. Two groups are processed at a time, so that there are enough
// independent sums even with the widest vectors, two of which cover a group. This is a macro, because a template cannot
// take its instruction set from an argument. The loops use the level's `step` (columns in a vector), Input, Dense, Sum,
// and its functions that expand and multiply.
#define LOOPS_OVER_COLUMNS(FOR_LEVEL)                                                                             \
    template <class Value>                                                                                        \
    FOR_LEVEL static inline auto block_of(uint64_t group, int block, const Value* values, Zero zero) {            \
        const uint64_t before = group & ((uint64_t(1) << block * step) - 1);                                      \
        return expand(place(group, block), values + __builtin_popcountll(before), zero);                          \
    }                                                                                                             \
    template <int TOKENS, int CHAINS, int FIRST, class Value>                                                     \
    FOR_LEVEL static inline void add_group(uint64_t group, const Value* values, const Input* inputs, Zero zero,   \
                                           Sum (*sums)[TOKENS]) {                                                 \
        _Pragma("GCC unroll 8") for (int block = 0; block < 64 / step; ++block) {                                 \
            const auto weight = block_of(group, block, values, zero);                                             \
            Sum* chain = sums[(FIRST + block) % CHAINS];                                                          \
            _Pragma("GCC unroll 8") for (int token = 0; token < TOKENS; ++token, inputs += step)                  \
                chain[token] = multiply_add(weight, inputs, chain[token]);                                        \
        }                                                                                                         \
    }                                                                                                             \
    template <int TOKENS, class Value>                                                                            \
    FOR_LEVEL static void row(const uint8_t* mask, int64_t columns, const Value* values, const Input* inputs,     \
                              float* totals) {                                                                    \
        constexpr int CHAINS = TOKENS > 4 ? 1 : TOKENS > 2 ? 2 : 4;                                               \
        const Zero zero = opaque_zero();                                                                          \
        Sum sums[CHAINS][TOKENS];                                                                                 \
        for (auto& some : sums)                                                                                   \
            for (Sum& sum : some) sum = no_sum();                                                                 \
        for (; columns >= 128; columns -= 128, mask += 16, inputs += 128 * TOKENS) {                              \
            const uint64_t group = load_mask(mask), next = load_mask(mask + 8);                                   \
            fetch_ahead(values);                                                                                  \
            add_group<TOKENS, CHAINS, 0>(group, values, inputs, zero, sums);                                      \
            values += __builtin_popcountll(group);                                                                \
            fetch_ahead(values);                                                                                  \
            add_group<TOKENS, CHAINS, 64 / step>(next, values, inputs + 64 * TOKENS, zero, sums);                 \
            values += __builtin_popcountll(next);                                                                 \
        }                                                                                                         \
        for (; columns > 0; columns -= 64, mask += 8, inputs += 64 * TOKENS) {                                    \
            const uint64_t group = columns < 64 ? load_mask(mask, ceiling(columns, 8)) : load_mask(mask);         \
            fetch_ahead(values);                                                                                  \
            add_group<TOKENS, CHAINS, 0>(group, values, inputs, zero, sums);                                      \
            values += __builtin_popcountll(group);                                                                \
        }                                                                                                         \
        for (int token = 0; token < TOKENS; ++token) {                                                            \
            Sum sum = sums[0][token];                                                                             \
            for (int chain = 1; chain < CHAINS; ++chain) sum = add(sum, sums[chain][token]);                      \
            totals[token] += total(sum);                                                                          \
        }                                                                                                         \
    }                                                                                                             \
    template <class Value>                                                                                        \
    FOR_LEVEL static inline void unpack_group(uint64_t group, const Value* values, float scale, Zero zero,        \
                                              Dense* to) {                                                        \
        _Pragma("GCC unroll 8") for (int block = 0; block < 64 / step; ++block)                                   \
            store(block_of(group, block, values, zero), scale, to + block * step);                                \
    }                                                                                                             \
    template <class Value>                                                                                        \
    FOR_LEVEL static void unpack_row(const uint8_t* mask, int64_t columns, const Value* values, float scale,      \
                                     Dense* row) {                                                                \
        const Zero zero = opaque_zero();                                                                          \
        for (; columns >= 64; columns -= 64, mask += 8, row += 64) {                                              \
            const uint64_t group = load_mask(mask);                                                               \
            unpack_group(group, values, scale, zero, row);                                                        \
            values += __builtin_popcountll(group);                                                                \
        }                                                                                                         \
        Dense last[64];                                                                                           \
        unpack_group(load_mask(mask, ceiling(columns, 8)), values, scale, zero, last);                            \
        memcpy(row, last, columns * sizeof(Dense));                                                               \
    }

struct Avx2 {
    static constexpr int step = 8;
    using Place = uint64_t;  // of a mask's entry in a table, in bytes
    using Input = float;
    using Dense = float;
    using Sum = __m256;
    struct Zero {};
    FOR_AVX2 static inline Zero opaque_zero() { return {}; }
    FOR_AVX2 static inline Place place(uint64_t group, int block) {
        return (block ? group >> (8 * block - 5) : group << 5) & 255 << 5;
    }
    FOR_AVX2 static inline __m256i entry(const void* table, Place place) {
        return *(const __m256i*)((const uint8_t*)table + place);
    }
    FOR_AVX2 static inline Sum no_sum() { return _mm256_setzero_ps(); }
    FOR_AVX2 static inline __m256 expand(Place place, const Bfloat16* values, Zero) {
        const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(eight, entry(TABLES.words, place)));
    }
    FOR_AVX2 static inline __m256 expand(Place place, const int8_t* values, Zero) {
        const __m256i eight = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)values));
        const __m256i highest = _mm256_shuffle_epi8(eight, entry(TABLES.bytes, place));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(highest, 24));
    }
    FOR_AVX2 static inline __m256 expand(Place place, const float* values, Zero) {
        const __m256i places = entry(TABLES.lanes, place);
        const __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places);
        return _mm256_blendv_ps(_mm256_setzero_ps(), placed, _mm256_castsi256_ps(places));
    }
    FOR_AVX2 static inline Sum multiply_add(__m256 weight, const float* inputs, Sum sum) {
        return _mm256_fmadd_ps(weight, _mm256_loadu_ps(inputs), sum);
    }
    FOR_AVX2 static inline Sum add(Sum one, Sum other) { return _mm256_add_ps(one, other); }
    FOR_AVX2 static inline float total(Sum sum) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    FOR_AVX2 static inline void store(__m256 weight, float scale, float* row) {
        _mm256_storeu_ps(row, _mm256_mul_ps(weight, _mm256_set1_ps(scale)));
    }
    LOOPS_OVER_COLUMNS(FOR_AVX2)
};

struct Avx512 {
    static constexpr int step = 16;
    using Place = uint16_t;  // the mask itself
    using Input = float;
    using Dense = float;
    using Sum = __m512;
    using Zero = __m512i;
    // On Zen 4, expansion with zeroing waits for the previous value of its destination. Expansion into zeros that the
    // compiler does not recognize as zeros takes half the time.
    FOR_AVX512 static inline Zero opaque_zero() {
        Zero zero = _mm512_setzero_si512();
        asm("" : "+m"(zero));
        return zero;
    }
    FOR_AVX512 static inline Place place(uint64_t group, int block) { return group >> 16 * block; }
    FOR_AVX512 static inline Sum no_sum() { return _mm512_setzero_ps(); }
    FOR_AVX512 static inline __m512 expand(Place place, const Bfloat16* values, Zero zero) {
        const __m256i packed = _mm256_loadu_si256((const __m256i*)values);
        const __m256i words = _mm256_mask_expand_epi16(_mm512_castsi512_si256(zero), place, packed);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    FOR_AVX512 static inline __m512 expand(Place place, const int8_t* values, Zero zero) {
        const __m128i packed = _mm_loadu_si128((const __m128i*)values);
        const __m128i bytes = _mm_mask_expand_epi8(_mm512_castsi512_si128(zero), place, packed);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    FOR_AVX512 static inline __m512 expand(Place place, const float* values, Zero zero) {
        return _mm512_mask_expand_ps(_mm512_castsi512_ps(zero), place, _mm512_loadu_ps(values));
    }
    FOR_AVX512 static inline Sum multiply_add(__m512 weight, const float* inputs, Sum sum) {
        return _mm512_fmadd_ps(weight, _mm512_loadu_ps(inputs), sum);
    }
    FOR_AVX512 static inline Sum add(Sum one, Sum other) { return _mm512_add_ps(one, other); }
    FOR_AVX512 static inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    FOR_AVX512 static inline void store(__m512 weight, float scale, float* row) {
        _mm512_storeu_ps(row, _mm512_mul_ps(weight, _mm512_set1_ps(scale)));
    }
    LOOPS_OVER_COLUMNS(FOR_AVX512)
};

struct ThirtyTwoColumns {  // common part of the two types below
    static constexpr int step = 32;
    using Place = uint32_t;  // the mask itself
    using Dense = Bfloat16;
    using Zero = __m512i;
    FOR_AVX512_BF16 static inline Zero opaque_zero() { return Avx512::opaque_zero(); }
    FOR_AVX512_BF16 static inline Place place(uint64_t group, int block) { return group >> 32 * block; }
};

struct Avx512Bf16 : ThirtyTwoColumns {  // for bfloat16 weights and inputs; other types use Avx512 at this level
    using Input = Bfloat16;
    using Sum = __m512;
    FOR_AVX512_BF16 static inline Sum no_sum() { return _mm512_setzero_ps(); }
    FOR_AVX512_BF16 static inline __m512i expand(Place place, const Bfloat16* values, Zero zero) {
        return _mm512_mask_expand_epi16(zero, place, _mm512_loadu_si512(values));
    }
    FOR_AVX512_BF16 static inline Sum multiply_add(__m512i weight, const Bfloat16* inputs, Sum sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)_mm512_loadu_si512(inputs));
    }
    FOR_AVX512_BF16 static inline Sum add(Sum one, Sum other) { return _mm512_add_ps(one, other); }
    FOR_AVX512_BF16 static inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    FOR_AVX512_BF16 static inline void store(__m512i weight, float, Bfloat16* row) { _mm512_storeu_si512(row, weight); }
    LOOPS_OVER_COLUMNS(FOR_AVX512_BF16)
};

// For int8 weights and bfloat16 inputs. Inputs are rounded to 16-bit steps of their token's largest input, which is much
// finer than the weights. Sums cannot overflow: PANEL_LIMIT / 16 products of at most 127 * 32767 are less than 2**31.
// Rows are unpacked without their scale to bfloat16, which represents every int8 value exactly.
struct Avx512Int8 : ThirtyTwoColumns {
    using Input = int16_t;
    using Sum = __m512i;
    FOR_AVX512_BF16 static inline Sum no_sum() { return _mm512_setzero_si512(); }
    FOR_AVX512_BF16 static inline __m512i expand(Place place, const int8_t* values, Zero zero) {
        const __m256i packed = _mm256_loadu_si256((const __m256i*)values);
        return _mm512_cvtepi8_epi16(_mm256_mask_expand_epi8(_mm512_castsi512_si256(zero), place, packed));
    }
    FOR_AVX512_BF16 static inline Sum multiply_add(__m512i weight, const int16_t* inputs, Sum sum) {
        return _mm512_dpwssd_epi32(sum, weight, _mm512_loadu_si512(inputs));
    }
    FOR_AVX512_BF16 static inline Sum add(Sum one, Sum other) { return _mm512_add_epi32(one, other); }
    FOR_AVX512_BF16 static inline float total(Sum sum) { return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(sum)); }
    FOR_AVX512_BF16 static inline void store(__m512i weight, float, Bfloat16* row) {
        const __m256i first = _mm512_castsi512_si256(weight), second = _mm512_extracti64x4_epi64(weight, 1);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(first));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(second));
        _mm512_storeu_si512(row, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    LOOPS_OVER_COLUMNS(FOR_AVX512_BF16)
};

#endif

// Values of a row, or a copy of them if a vector load could read beyond the end of all values.
template <class Value>
const Value* readable(const SparseWeight& weight, int64_t row_in_panels, Value* copy) {
    const Value* all = static_cast<const Value*>(weight.values);
    const int64_t first = weight.starts[row_in_panels], end = weight.starts[row_in_panels + 1];
    const int64_t count = weight.starts[weight.rows * ceiling(weight.columns, weight.panel_columns)];
    if (end + OVERREAD <= count) return all + first;
    if (end > first) memcpy(copy, all + first, (end - first) * sizeof(Value));
    return copy;
}

// Calls `visit(panel's first column, its columns, row, row's mask, its values)` for rows [first, last), panel by panel.
template <class Value, class Visit>
void visit_rows(const SparseWeight& weight, int64_t first, int64_t last, Visit visit) {
    alignas(ALIGNMENT) Value copy[PANEL_LIMIT + OVERREAD];
    const uint8_t* mask = weight.mask;
    for (int64_t column = 0, index = 0; column < weight.columns; column += weight.panel_columns, index += weight.rows) {
        const int64_t left = weight.columns - column;
        const int64_t columns = left < weight.panel_columns ? left : weight.panel_columns;
        for (int64_t row = first; row < last; ++row)
            visit(column, columns, row, mask + row * ceiling(columns, 8), readable<Value>(weight, index + row, copy));
        mask += weight.rows * ceiling(columns, 8);
    }
}

// Calls `work(first row, row after the last)` in every thread.
template <class Work>
void share_rows(int64_t rows, int threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        work(rows * thread / all, rows * (thread + 1) / all);
    }
#else
    (void)threads;
    work(int64_t(0), rows);
#endif
}

float row_scale(const SparseWeight& weight, int64_t row) { return weight.scales ? weight.scales[row] : 1.0f; }

// Size of one unit of a token's arranged inputs: 1, unless they are rounded to 16-bit steps.
template <class Input, class Element>
float unit_of(const Element* inputs, int64_t columns) {
    if (!std::is_same<Input, int16_t>::value) return 1.0f;
    float largest = 0;
    for (int64_t column = 0; column < columns; ++column) {
        const float size = std::fabs(widen(inputs[column]));
        if (!(size < INFINITY)) return NAN;  // makes all outputs NAN
        largest = size > largest ? size : largest;
    }
    return largest > 0 ? largest / INT16_STEPS : 1.0f;
}

void convert(Bfloat16 from, float, float& to) { to = widen(from); }
void convert(Bfloat16 from, float units, int16_t& to) {
    const float steps = widen(from) * units, limit = INT16_STEPS;
    const float within = steps > limit ? limit : steps > -limit ? steps : -limit;
    to = int16_t(within + (within < 0 ? -0.5f : 0.5f));
}
template <class Same>
void convert(Same from, float, Same& to) {
    to = from;
}

// Arranges inputs in the order of the loops: `step` columns of the first token, the same columns of the next token, and so
// on, padded with zeros to whole groups of 64 columns. Writes the size of one unit of each token to `units`.
template <class Input, class Element>
void arrange(const Element* inputs, int64_t tokens, int64_t columns, int64_t step, Input* arranged, float* units) {
    for (int64_t token = 0; token < tokens; ++token) units[token] = unit_of<Input>(inputs + token * columns, columns);
    for (int64_t first = 0; first < ceiling(columns, 64) * 64; first += step)
        for (int64_t token = 0; token < tokens; ++token, arranged += step) {
            const int64_t left = columns - first, count = left < 0 ? 0 : left < step ? left : step;
            memset(arranged + count, 0, (step - count) * sizeof(Input));
            const float in_a_unit = 1.0f / units[token];
            for (int64_t column = 0; column < count; ++column)
                convert(inputs[token * columns + first + column], in_a_unit, arranged[column]);
        }
}

template <class Simd, class Value, int TOKENS, class Element>
void multiply_some(const SparseWeight& weight, int threads, const Element* inputs, const Element* bias,
                   Element* outputs, void* workspace) {
    auto* arranged = static_cast<typename Simd::Input*>(workspace);
    float units[TOKENS];
    arrange(inputs, TOKENS, weight.columns, Simd::step, arranged, units);
    float* sums = reinterpret_cast<float*>(arranged + ceiling(weight.columns, ALIGNMENT) * ALIGNMENT * TOKENS);
    share_rows(weight.rows, threads, [&](int64_t first, int64_t last) {
        memset(sums + first * TOKENS, 0, (last - first) * TOKENS * sizeof(float));
        visit_rows<Value>(weight, first, last,
                          [&](int64_t column, int64_t columns, int64_t row, const uint8_t* mask, const Value* values) {
                              Simd::template row<TOKENS>(mask, columns, values, arranged + column * TOKENS,
                                                          sums + row * TOKENS);
                          });
        for (int64_t row = first; row < last; ++row)
            for (int token = 0; token < TOKENS; ++token) {
                const float sum = sums[row * TOKENS + token] * row_scale(weight, row) * units[token];
                narrow(sum + (bias ? widen(bias[row]) : 0.0f), outputs[token * weight.rows + row]);
            }
    });
}

template <class Simd, class Value, class Element>
int multiply(const SparseWeight& weight, int threads, int64_t tokens, const Element* inputs, const Element* bias,
             Element* outputs) {
    const int64_t widest = tokens < MOST_TOKENS ? tokens : MOST_TOKENS;
    const int64_t floats = (ceiling(weight.columns, ALIGNMENT) * ALIGNMENT + weight.rows) * widest;
    void* workspace = aligned_alloc(ALIGNMENT, ceiling(floats * sizeof(float), ALIGNMENT) * ALIGNMENT);
    if (!workspace) return 1;
    for (int64_t some; tokens > 0; tokens -= some, inputs += some * weight.columns, outputs += some * weight.rows) {
        some = tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        const auto run = some == 8   ? multiply_some<Simd, Value, 8, Element>
                         : some == 4 ? multiply_some<Simd, Value, 4, Element>
                         : some == 2 ? multiply_some<Simd, Value, 2, Element>
                                     : multiply_some<Simd, Value, 1, Element>;
        run(weight, threads, inputs, bias, outputs, workspace);
    }
    free(workspace);
    return 0;
}

template <class Simd, class Value>
int unpack(const SparseWeight& weight, int threads, int64_t first_row, int64_t last_row, void* dense) {
    auto* rows = static_cast<typename Simd::Dense*>(dense);
    share_rows(last_row - first_row, threads, [&](int64_t first, int64_t last) {
        visit_rows<Value>(weight, first_row + first, first_row + last,
                          [&](int64_t column, int64_t columns, int64_t row, const uint8_t* mask, const Value* values) {
                              Simd::unpack_row(mask, columns, values, row_scale(weight, row),
                                                rows + (row - first_row) * weight.columns + column);
                          });
    });
    return 0;
}

#if defined(__x86_64__)
#define AT_LEVEL(level, function, Value, ...)                                                                          \
    ((level) >= AVX512 ? function<Avx512, Value>(__VA_ARGS__)                                                          \
     : (level) == AVX2 ? function<Avx2, Value>(__VA_ARGS__)                                                            \
                       : function<Portable, Value>(__VA_ARGS__))
#else
#define AT_LEVEL(level, function, Value, ...) function<Portable, Value>(__VA_ARGS__)
#endif

}  // namespace

extern "C" {

// Version of the interface. Raise it by hand, here and in native.py, when a function (also of ranking.cpp) or
// SparseWeight changes.
int layerwise_interface() { return 3; }

// Highest Level that this CPU supports.
int layerwise_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (!avx2 || !__builtin_cpu_supports("popcnt")) return PORTABLE;
    if (!__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? AVX512_BF16 : AVX512;
#else
    return PORTABLE;
#endif
}

// Computes outputs (tokens, rows) = inputs (tokens, columns) times the weight's transpose, plus bias if it is not null.
// `element` is the type of inputs, bias and outputs (bfloat16 or float32): the weight's `kind`, unless that is int8.
// Returns 0, or 1 if there is not enough memory for a copy of the inputs.
int layerwise_multiply(const SparseWeight* weight, int level, int threads, int element, int64_t tokens,
                       const void* inputs, const void* bias, void* outputs) {
#define ELEMENTS(Type) tokens, (const Type*)inputs, (const Type*)bias, (Type*)outputs
    if (weight->kind == FLOAT32) return AT_LEVEL(level, multiply, float, *weight, threads, ELEMENTS(float));
    if (weight->kind == INT8 && element == FLOAT32)
        return AT_LEVEL(level, multiply, int8_t, *weight, threads, ELEMENTS(float));
#if defined(__x86_64__)
    if (weight->kind == INT8 && level == AVX512_BF16)
        return multiply<Avx512Int8, int8_t>(*weight, threads, ELEMENTS(Bfloat16));
#endif
    if (weight->kind == INT8) return AT_LEVEL(level, multiply, int8_t, *weight, threads, ELEMENTS(Bfloat16));
#if defined(__x86_64__)
    if (level == AVX512_BF16) return multiply<Avx512Bf16, Bfloat16>(*weight, threads, ELEMENTS(Bfloat16));
#endif
    return AT_LEVEL(level, multiply, Bfloat16, *weight, threads, ELEMENTS(Bfloat16));
}

// Unpacks rows [first_row, last_row) to a dense matrix for inputs of type `element`. The matrix is bfloat16 if the inputs
// are and the level is AVX512_BF16, in which case int8 values are not scaled; otherwise it is float32.
int layerwise_unpack(const SparseWeight* weight, int level, int threads, int element, int64_t first_row,
                     int64_t last_row, void* dense) {
#define ROWS *weight, threads, first_row, last_row, dense
#if defined(__x86_64__)
    if (level == AVX512_BF16 && element == BFLOAT16)
        return weight->kind == INT8 ? unpack<Avx512Int8, int8_t>(ROWS) : unpack<Avx512Bf16, Bfloat16>(ROWS);
#endif
    if (weight->kind == FLOAT32) return AT_LEVEL(level, unpack, float, ROWS);
    if (weight->kind == INT8) return AT_LEVEL(level, unpack, int8_t, ROWS);
    return AT_LEVEL(level, unpack, Bfloat16, ROWS);
}

}  // extern "C"
