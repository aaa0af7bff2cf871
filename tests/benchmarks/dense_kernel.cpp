// Dense product of a bfloat16 matrix and one vector that reads the matrix exactly once: a strong dense baseline for
// sparse_kernel.py.

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define FOR_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define FOR_AVX2 __attribute__((target("avx2,fma")))


FOR_AVX512_BF16 static float row_avx512(const uint16_t* row, const uint16_t* inputs, int64_t columns) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t column = 0; column < columns; column += 128)
        for (int chain = 0; chain < 4; ++chain) {
            const int64_t at = column + 32 * chain;
            sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)_mm512_loadu_si512(row + at),
                                           (__m512bh)_mm512_loadu_si512(inputs + at));
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

FOR_AVX2 static float row_avx2(const uint16_t* row, const uint16_t* inputs, int64_t columns) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    for (int64_t column = 0; column < columns; column += 16) {
        const __m256i weights = _mm256_loadu_si256((const __m256i*)(row + column));
        const __m256i values = _mm256_loadu_si256((const __m256i*)(inputs + column));
        even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)),
                               _mm256_castsi256_ps(_mm256_slli_epi32(values, 16)), even);
        odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights, upper)),
                              _mm256_castsi256_ps(_mm256_and_si256(values, upper)), odd);
    }
    alignas(32) float sums[8];
    _mm256_store_ps(sums, _mm256_add_ps(even, odd));
    float total = 0;
    for (const float sum : sums) total += sum;
    return total;
}

// Computes outputs (rows) = weight (rows, columns) times inputs (columns); columns is a multiple of 128.
extern "C" void dense_multiply(const uint16_t* weight, const uint16_t* inputs, float* outputs, int64_t rows,
                               int64_t columns, int threads) {
    const bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        outputs[row] = (avx512 ? row_avx512 : row_avx2)(weight + row * columns, inputs, columns);
}
