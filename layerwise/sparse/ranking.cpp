// Levels of removal of the weights in each row, on CPUs; called by native.py through ctypes.
//
// The level of a weight is the index of the first of several counts at which it is removed. It does not need the order
// of the weights, only the order statistics at the counts. Each row is read three times: for the range of its scores,
// for a histogram of them, and to write the levels. A bin of the histogram that no count splits has one level. The few
// scores in the other bins are partitioned together with their columns, so that of equal scores the first are removed
// first.

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC optimize("O3")  // vectorizes the first loop over a row; the others take the same time
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

enum Kind { BFLOAT16, FLOAT32, FLOAT16 };

struct Bfloat16 {
    using Bits = uint16_t;
    static constexpr int32_t largest = 0x7fff, infinity = 0x7f80;
};
struct Float32 {
    using Bits = uint32_t;
    static constexpr int32_t largest = 0x7fffffff, infinity = 0x7f800000;
};
struct Float16 {
    using Bits = uint16_t;
    static constexpr int32_t largest = 0x7fff, infinity = 0x7c00;
};

// Integer in the order of the scores. As in torch's sort, both zeros are equal, and every NaN is equal to every other
// and above infinity.
template <class Type>
inline int32_t number(typename Type::Bits bits) {
    const int32_t magnitude = bits & Type::largest;
    const int32_t signed_magnitude = bits > typename Type::Bits(Type::largest) ? -magnitude : magnitude;
    return magnitude > Type::infinity ? Type::infinity + 1 : signed_magnitude;
}

constexpr int64_t SHORT_ROW = 64;  // columns up to which all scores are partitioned, without a histogram
constexpr int FEWEST_BITS = 10, MOST_BITS = 16;  // of the index of a bin

// Score (above the lowest of its row) and column: unique, and in the order of removal.
inline uint64_t entry(uint32_t score, int64_t column) { return uint64_t(score) << 32 | uint64_t(column); }

// Partitions entries [begin, end) at the places ends[first] to ends[last - 1], which are ascending.
void partition(uint64_t* entries, int64_t begin, int64_t end, const int64_t* ends, int64_t first, int64_t last) {
    while (first < last && ends[first] <= begin) ++first;
    while (first < last && ends[last - 1] >= end) --last;
    if (first == last) return;
    const int64_t middle = first + (last - first) / 2, place = ends[middle];
    std::nth_element(entries + begin, entries + place, entries + end);
    partition(entries, begin, place, ends, first, middle);
    partition(entries, place, end, ends, middle + 1, last);
}

// Writes the levels of the entries, of which the lowest ends[level] are removed at each level.
void write_levels(uint64_t* entries, int64_t count, const std::vector<int64_t>& ends, uint8_t* levels) {
    const int64_t all = int64_t(ends.size());
    partition(entries, 0, count, ends.data(), 0, all);
    for (int64_t level = 0, place = 0; level <= all; ++level)
        for (const int64_t end = level < all ? ends[level] : count; place < end; ++place)
            levels[uint32_t(entries[place])] = uint8_t(level);
}

// Memory of one thread, which all its rows use.
class Row {
public:
    std::vector<int64_t> removed;  // number of weights to remove from the row, by level; ascending

    template <class Type>
    void write(const typename Type::Bits* scores, int64_t columns, uint8_t* levels) {
        if (columns <= SHORT_ROW) {
            uint64_t entries[SHORT_ROW];
            for (int64_t column = 0; column < columns; ++column)
                entries[column] = entry(uint32_t(number<Type>(scores[column])) ^ 0x80000000, column);
            return write_levels(entries, columns, removed, levels);
        }
        int32_t lowest = INT32_MAX, highest = INT32_MIN;
        for (int64_t column = 0; column < columns; ++column) {
            lowest = std::min(lowest, number<Type>(scores[column]));
            highest = std::max(highest, number<Type>(scores[column]));
        }
        const auto above_lowest = [&](int64_t column) {
            return uint32_t(number<Type>(scores[column])) - uint32_t(lowest);
        };
        const uint32_t range = uint32_t(highest) - uint32_t(lowest);
        int shift = 0;
        while (range >> shift >> bits_of(columns)) ++shift;
        bins.assign((range >> shift) + 1, 0);
        for (int64_t column = 0; column < columns; ++column) ++bins[above_lowest(column) >> shift];
        const int64_t undecided = decide();
        uint64_t* entries = reserve(undecided + 1);  // one more: the place of entries that are not kept
        int64_t count = 0;
        for (int64_t column = 0; column < columns; ++column) {
            const uint32_t score = above_lowest(column), bin = bins[score >> shift];
            levels[column] = uint8_t(bin);
            entries[count] = entry(score, column);
            count += bin >> 8;
        }
        write_levels(entries, count, ends, levels);
    }

private:
    std::vector<uint32_t> bins;
    std::vector<int64_t> ends;  // number of entries to remove, by level
    std::unique_ptr<uint64_t[]> memory;
    int64_t capacity = 0;

    // About two scores in a bin, so that bins take little time compared with scores.
    static int bits_of(int64_t columns) {
        int bits = FEWEST_BITS;
        while (bits < MOST_BITS && int64_t(2) << bits < columns) ++bits;
        return bits;
    }

    // Replaces the number of scores in each bin by the level of its scores, plus 256 if a count splits the bin. Fills
    // `ends`. Returns the number of scores in bins that are split.
    int64_t decide() {
        const int64_t all = int64_t(removed.size());
        ends.resize(all);
        int64_t before = 0, undecided = 0, level = 0;
        for (uint32_t& bin : bins) {
            while (level < all && removed[level] <= before) ends[level++] = undecided;
            const int64_t after = before + bin, first = level;
            while (level < all && removed[level] < after) {
                ends[level] = undecided + removed[level] - before;
                ++level;
            }
            const bool split = level > first;
            if (split) undecided += bin;
            bin = uint32_t(level) | uint32_t(split) << 8;
            before = after;
        }
        while (level < all) ends[level++] = undecided;
        return undecided;
    }

    uint64_t* reserve(int64_t count) {
        if (count > capacity) {
            memory.reset();  // before more is allocated
            capacity = 0;
            memory.reset(new uint64_t[count]);
            capacity = count;
        }
        return memory.get();
    }
};

template <class Type>
int write_all(int threads, int64_t rows, int64_t columns, const void* scores, int64_t counts, const int64_t* per_row,
              const int64_t* extra, uint8_t* levels) {
    int failed = 0;
    if (rows < threads) threads = rows < 1 ? 1 : int(rows);  // further threads would only wait
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Row memory;
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            try {
                memory.removed.resize(counts);
                for (int64_t level = 0; level < counts; ++level)
                    memory.removed[level] = per_row[level] + (row < extra[level]);
                memory.write<Type>(static_cast<const typename Type::Bits*>(scores) + row * columns, columns,
                                   levels + row * columns);
            } catch (const std::bad_alloc&) {
                failed = 1;
            }
        }
    }
    return failed;
}

}  // namespace

extern "C" {

// Writes the levels of scores of type `kind`, both (rows, columns). Level j is for the per_row[j] lowest scores of each
// row, and for one more in the first extra[j] rows; at most 255 ascending counts, and fewer than 2**32 columns.
// Returns 0, or 1 if there is not enough memory for the scores in the bins that are split (8 bytes each).
int layerwise_levels(int threads, int kind, int64_t rows, int64_t columns, const void* scores, int64_t counts,
                     const int64_t* per_row, const int64_t* extra, uint8_t* levels) {
    const auto write = kind == FLOAT32   ? write_all<Float32>
                       : kind == FLOAT16 ? write_all<Float16>
                                         : write_all<Bfloat16>;
    return write(threads, rows, columns, scores, counts, per_row, extra, levels);
}

}  // extern "C"
