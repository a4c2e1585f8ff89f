// C[m, n] = A[m, k] B[k, n], or += : the one matrix product that attention's seven are built from.
//
// B and C are rows of vectors; A is read one element at a time and broadcast, so that it may lie either way round. A
// tile of MR rows by NV vectors of C stays in registers while k runs.

#pragma once

#ifdef MEDITRON_BF16_PRODUCTS
#include <immintrin.h>
#endif

#include "../../cpu/simd.h"

namespace meditron::MEDITRON_ISA {

#if MEDITRON_VECTOR_BYTES == 64
constexpr int MR = 12, NV = 2;  // 24 of 32 registers hold C
#else
constexpr int MR = 6, NV = 2;  // 12 of 16
#endif

// What the products compute with. An element is 32 bits: one fp32 number, or a pair of bfloat16 numbers of which k
// takes both at once. Element (i, k) of A then holds A[i, 2k] and A[i, 2k+1], and element (k, j) of B holds B[2k, j]
// and B[2k+1, j]. Pairs are also stored as `float`, but never used in fp32 arithmetic.
struct Fp32Math {
    static constexpr int per_element = 1;
    static MEDITRON_INLINE Vec multiply_add(Vec sum, float left, Vec right) { return sum + left * right; }
};

#ifdef MEDITRON_BF16_PRODUCTS
struct Bf16Math {
    static constexpr int per_element = 2;
    static MEDITRON_INLINE Vec multiply_add(Vec sum, float left, Vec right) {
        const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_ps(left));
        return _mm512_dpbf16_ps(sum, pair, reinterpret_cast<__m512bh>(right));
    }
};
#endif

// A[i, k] is data[i * row + k * step].
struct Left {
    const float* data;
    int64_t row, step;
};

template <class Math, int rows, int vectors, bool accumulate>
__attribute__((noinline)) void multiply_tile(int64_t k_size, Left a, const float* b, int64_t ldb, float* c,
                                             int64_t ldc) {
    Vec sum[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(c + i * ldc + j * VL) : Vec{};
    for (int64_t k = 0; k < k_size; ++k) {
        Vec right[vectors];
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) right[j] = load(b + j * VL);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < vectors; ++j) sum[i][j] = Math::multiply_add(sum[i][j], a.data[i * a.row], right[j]);
        }
        a.data += a.step;
        b += ldb;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) store(c + i * ldc + j * VL, sum[i][j]);
}

using TileFunction = void (*)(int64_t, Left, const float*, int64_t, float*, int64_t);

template <class Math, bool accumulate, int rows = MR>
MEDITRON_INLINE TileFunction tile_function(int num_rows, int vectors) {
    if constexpr (rows > 1)
        if (num_rows < rows) return tile_function<Math, accumulate, rows - 1>(num_rows, vectors);
    return vectors == NV ? multiply_tile<Math, rows, NV, accumulate> : multiply_tile<Math, rows, 1, accumulate>;
}

// At most MR rows of C; n_size is a multiple of VL, k_size counts elements.
template <class Math, bool accumulate>
void multiply_rows(int num_rows, int64_t n_size, int64_t k_size, Left a, const float* b, int64_t ldb, float* c,
                   int64_t ldc) {
    const TileFunction wide = tile_function<Math, accumulate>(num_rows, NV);
    int64_t n = 0;
    for (; n + NV * VL <= n_size; n += NV * VL) wide(k_size, a, b + n, ldb, c + n, ldc);
    if (n < n_size) {  // NV is 2: one vector is left
        static_assert(NV == 2);
        tile_function<Math, accumulate>(num_rows, 1)(k_size, a, b + n, ldb, c + n, ldc);
    }
}

// The rows of a block in tiles of nearly equal height: 13 rows are 7 + 6, as a tile of one row would run at a tenth of
// the speed.
struct RowTiles {
    int64_t num_rows, num_tiles;
    explicit RowTiles(int64_t rows) : num_rows(rows), num_tiles((rows + MR - 1) / MR) {}
    int64_t begin(int64_t tile) const { return tile * num_rows / num_tiles; }
    int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

}  // namespace meditron::MEDITRON_ISA
