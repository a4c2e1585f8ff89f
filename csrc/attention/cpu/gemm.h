// C[m, n] = A[m, k] B[k, n], or += : the one matrix product of which attention's seven are made.
//
// B and C are rows of vectors; A is read one number at a time and broadcast, so that it may lie either way round. A tile of
// MR rows by NV vectors of C stays in registers while k runs.

#pragma once

#include "../../cpu/simd.h"

namespace meditron::MEDITRON_ISA {

#if MEDITRON_VECTOR_BYTES == 64
constexpr int MR = 12, NV = 2;  // 24 of 32 registers hold C
#else
constexpr int MR = 6, NV = 2;  // 12 of 16
#endif

// A[i, k] is data[i * row + k * step].
struct Left {
    const float* data;
    int64_t row, step;
};

template <int rows, int vectors, bool accumulate>
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
            const Vec left = broadcast(a.data[i * a.row]);
#pragma GCC unroll 16
            for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
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

template <bool accumulate, int rows = MR>
MEDITRON_INLINE TileFunction tile_function(int num_rows, int vectors) {
    if constexpr (rows == 1) {
        return vectors == NV ? multiply_tile<1, NV, accumulate> : multiply_tile<1, 1, accumulate>;
    } else {
        if (num_rows == rows) return vectors == NV ? multiply_tile<rows, NV, accumulate> : multiply_tile<rows, 1, accumulate>;
        return tile_function<accumulate, rows - 1>(num_rows, vectors);
    }
}

// At most MR rows of C; n_size is a multiple of VL.
template <bool accumulate>
void multiply_rows(int num_rows, int64_t n_size, int64_t k_size, Left a, const float* b, int64_t ldb, float* c,
                   int64_t ldc) {
    const TileFunction wide = tile_function<accumulate>(num_rows, NV);
    int64_t n = 0;
    for (; n + NV * VL <= n_size; n += NV * VL) wide(k_size, a, b + n, ldb, c + n, ldc);
    if (n < n_size) {  // NV is 2: one vector is left
        static_assert(NV == 2);
        tile_function<accumulate>(num_rows, 1)(k_size, a, b + n, ldb, c + n, ldc);
    }
}

// The rows of a block in tiles of nearly equal height: 13 rows are 7 + 6, as a tile of one row would run at a tenth of the speed.
struct RowTiles {
    int64_t num_rows, num_tiles;
    explicit RowTiles(int64_t rows) : num_rows(rows), num_tiles((rows + MR - 1) / MR) {}
    int64_t begin(int64_t tile) const { return tile * num_rows / num_tiles; }
    int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

}  // namespace meditron::MEDITRON_ISA
