// The AVX-512 instructions that kernel.cpp uses, in plain C++ after Intel's description of them, so that its loops for
// AVX-512 can be run on a CPU without it. Included before kernel.cpp, which then finds these names in their place.
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define EMULATED __attribute__((target("avx2,fma,popcnt,bmi2")))
#define FOR_AVX512 EMULATED
#define FOR_AVX512_BF16 EMULATED
#define __builtin_cpu_supports(feature) 1

namespace emulated {

template <class Vector, class Lane>
struct Lanes {
    static constexpr int count = sizeof(Vector) / sizeof(Lane);
    Lane lane[count];
    EMULATED Lanes(const Vector& vector) { memcpy(lane, &vector, sizeof(Vector)); }
    EMULATED Vector vector() const {
        Vector result;
        memcpy(&result, lane, sizeof(Vector));
        return result;
    }
};

template <class Lane, class Vector>
EMULATED Vector mask_expand(Vector source, uint32_t mask, Vector packed) {
    Lanes<Vector, Lane> result(source);
    const Lanes<Vector, Lane> values(packed);
    for (int lane = 0, next = 0; lane < result.count; ++lane)
        if (mask >> lane & 1) result.lane[lane] = values.lane[next++];
    return result.vector();
}

template <class To, class From, class Vector>
EMULATED __m512i convert_integers(Vector vector) {
    Lanes<__m512i, To> result(__m512i{});
    const Lanes<Vector, From> values(vector);
    for (int lane = 0; lane < result.count; ++lane) result.lane[lane] = values.lane[lane];
    return result.vector();
}

template <class To, class From>
EMULATED To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

EMULATED inline __m512 loadu_ps(const void* from) {
    __m512 vector;
    memcpy(&vector, from, 64);
    return vector;
}
EMULATED inline void storeu_ps(void* to, __m512 vector) { memcpy(to, &vector, 64); }
EMULATED inline __m512i loadu_si512(const void* from) { return same_bits<__m512i>(loadu_ps(from)); }
EMULATED inline void storeu_si512(void* to, __m512i vector) { memcpy(to, &vector, 64); }

EMULATED inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    Lanes<__m512, float> result(c);
    for (int lane = 0; lane < 16; ++lane) result.lane[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return result.vector();
}
EMULATED inline float reduce_add_ps(__m512 vector) {
    float half[8];
    for (int lane = 0; lane < 8; ++lane) half[lane] = vector[lane] + vector[lane + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}
EMULATED inline __m512i slli_epi32(__m512i vector, int places) {
    Lanes<__m512i, uint32_t> result(vector);
    for (uint32_t& lane : result.lane) lane <<= places;
    return result.vector();
}
EMULATED inline __m512 cvtepi32_ps(__m512i vector) {
    const Lanes<__m512i, int32_t> values(vector);
    Lanes<__m512, float> result(__m512{});
    for (int lane = 0; lane < 16; ++lane) result.lane[lane] = float(values.lane[lane]);
    return result.vector();
}
EMULATED inline __m512i add_epi32(__m512i a, __m512i b) {
    Lanes<__m512i, uint32_t> result(a);
    const Lanes<__m512i, uint32_t> other(b);
    for (int lane = 0; lane < 16; ++lane) result.lane[lane] += other.lane[lane];
    return result.vector();
}
EMULATED inline __m512i dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    const Lanes<__m512i, int16_t> left(a), right(b);
    Lanes<__m512i, uint32_t> result(sum);
    for (int part = 0; part < 32; ++part) result.lane[part / 2] += uint32_t(left.lane[part] * right.lane[part]);
    return result.vector();
}
EMULATED inline __m256i extracti64x4_epi64(__m512i vector, int half) {
    __m256i result;
    memcpy(&result, reinterpret_cast<const char*>(&vector) + 32 * half, 32);
    return result;
}
EMULATED inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {  // of numbers that bfloat16 has, which is what is tested
    Lanes<__m512i, uint16_t> result(__m512i{});
    for (int lane = 0; lane < 16; ++lane) {
        result.lane[lane] = same_bits<uint32_t>(float(low[lane])) >> 16;
        result.lane[lane + 16] = same_bits<uint32_t>(float(high[lane])) >> 16;
    }
    return result.vector();
}
EMULATED inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const Lanes<__m512bh, uint16_t> left(a), right(b);
    Lanes<__m512, float> result(sum);
    for (int lane = 0; lane < 16; ++lane)
        for (int part : {2 * lane + 1, 2 * lane}) {
            const float one = same_bits<float>(uint32_t(left.lane[part]) << 16);
            result.lane[lane] += one * same_bits<float>(uint32_t(right.lane[part]) << 16);
        }
    return result.vector();
}

}  // namespace emulated

#define _mm512_setzero_ps() (__m512{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_ps(value) (__m512{} + (value))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_castsi512_ps emulated::same_bits<__m512>
#define _mm512_castsi512_si256 emulated::same_bits<__m256i>
#define _mm512_castsi512_si128 emulated::same_bits<__m128i>
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::convert_integers<uint32_t, uint16_t>
#define _mm512_cvtepi8_epi32 emulated::convert_integers<int32_t, int8_t>
#define _mm512_mask_expand_ps emulated::mask_expand<float>
#define _mm512_mask_expand_epi16 emulated::mask_expand<uint16_t>
#define _mm256_mask_expand_epi16 emulated::mask_expand<uint16_t>
#define _mm_mask_expand_epi8 emulated::mask_expand<uint8_t>
#define _mm256_mask_expand_epi8 emulated::mask_expand<uint8_t>
#define _mm512_cvtepi8_epi16 emulated::convert_integers<int16_t, int8_t>
#define _mm512_cvtepi16_epi32 emulated::convert_integers<int32_t, int16_t>
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_dpwssd_epi32 emulated::dpwssd_epi32
#define _mm512_dpbf16_ps emulated::dpbf16_ps
