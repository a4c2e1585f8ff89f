// Tiles of q, k, v in shared memory: copying them in, rotating them in place, multiplying them, writing them out.
//
// A tile holds rows of D 16-bit values, D / 8 chunks of 16 bytes each. The chunks of a row are permuted so that the 8
// rows that ldmatrix reads at once lie in 8 different groups of 4 banks, for every D that is a multiple of 16.

#pragma once

#include "../attention/attention.h"
#include "ptx.cuh"

namespace meditron {

template <int D>
struct Layout {
    static constexpr int chunks = D / 8;
    // Row r starts at bank group r * chunks mod 8. That meets only 8 / spread different groups; permuting by this many
    // low bits of the chunk reaches the others.
    static constexpr int spread = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
    static_assert(D % 16 == 0);

    __host__ __device__ static constexpr int bytes(int rows) { return rows * D * 2; }

    // What is xor'ed to the chunks of a row.
    __device__ static int permutation(int row) { return row % 8 / (8 / spread); }
    __device__ static unsigned char* address(unsigned char* tile, int row, int chunk) {
        return tile + (row * chunks + (chunk ^ permutation(row))) * 16;
    }
};

// Consecutive rows of one head that are to fill a tile: `num_valid` of them exist, the rest of the tile is zeros.
struct Rows {
    const unsigned char* first;
    int64_t stride_bytes;
    int32_t token, num_valid;  // of the first row, as positions count them
};

__device__ inline Rows rows_of(const Heads& heads, int64_t head, int32_t token, int32_t num_valid) {
    const int64_t offset = token * heads.token_stride + head * heads.head_stride;
    return {static_cast<const unsigned char*>(heads.data) + 2 * offset, 2 * heads.token_stride, token, num_valid};
}

// Where functions have a parameter L, it is the layout of the tile in shared memory.

// Calls visit(row, chunk) for the calling thread's share of a tile's chunk pairs (chunk, chunk + D / 16). Copying and
// rotating share the work in the same way, so that a thread rotates what it copied itself: no barrier between.
// Unrolled further, these loops take the registers that the accumulators around them need.
template <int D, int rows, int num_threads, int unroll, class Visit>
__device__ __forceinline__ void for_my_chunk_pairs(Visit visit) {
    constexpr int half = Layout<D>::chunks / 2, num_pairs = rows * half;
#pragma unroll unroll
    for (int first = 0; first < num_pairs; first += num_threads) {
        const int pair = first + threadIdx.x;
        if (num_pairs % num_threads == 0 || pair < num_pairs) visit(pair / half, pair % half);
    }
}

template <int D, int rows, int num_threads, class L = Layout<D>>
__device__ __forceinline__ void start_copy(unsigned char* tile, const Rows& from) {
    for_my_chunk_pairs<D, rows, num_threads, 1>([&](int row, int chunk) {
        const bool valid = row < from.num_valid;
        const unsigned char* source = from.first + (valid ? row : 0) * from.stride_bytes;
        cp_async_16(L::address(tile, row, chunk), source + 16 * chunk, valid);
        const int other = chunk + Layout<D>::chunks / 2;
        cp_async_16(L::address(tile, row, other), source + 16 * other, valid);
    });
}

// Rotary embedding as a problem describes it.
struct Rotation {
    const float *cos, *sin;  // null: none
    const int64_t* positions;

    __device__ int64_t table_row(int32_t token) const { return positions == nullptr ? token : positions[token]; }
};

__device__ inline Rotation rotation_of_queries(const AttentionProblem& problem) {
    return {problem.cos, problem.sin, problem.q_positions};
}

__device__ inline Rotation rotation_of_keys(const AttentionProblem& problem) {
    return {problem.cos, problem.sin, problem.k_positions};
}

__device__ inline float as_float(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } both{bits};
    return both.value;
}

// After the calling thread's own copies have arrived.
template <class T, int D, int rows, int num_threads, class L = Layout<D>, int unroll = 2>
__device__ __forceinline__ void rotate(unsigned char* tile, const Rows& from, const Rotation& rotation) {
    if (rotation.cos == nullptr) return;
    for_my_chunk_pairs<D, rows, num_threads, unroll>([&](int row, int chunk) {
        if (row >= from.num_valid) return;
        auto* low = reinterpret_cast<Vec16*>(L::address(tile, row, chunk));
        auto* high = reinterpret_cast<Vec16*>(L::address(tile, row, chunk + Layout<D>::chunks / 2));
        const int64_t angles = rotation.table_row(from.token + row) * (D / 2) + 8 * chunk;
        Vec16 a = *low, b = *high;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const Vec16 cos = *reinterpret_cast<const Vec16*>(rotation.cos + angles + 4 * part);
            const Vec16 sin = *reinterpret_cast<const Vec16*>(rotation.sin + angles + 4 * part);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Float2 x = unpack<T>(a.words[2 * part + i]), y = unpack<T>(b.words[2 * part + i]);
                const float c0 = as_float(cos.words[2 * i]), c1 = as_float(cos.words[2 * i + 1]);
                const float s0 = as_float(sin.words[2 * i]), s1 = as_float(sin.words[2 * i + 1]);
                a.words[2 * part + i] = pack<T>(x.x * c0 - y.x * s0, x.y * c1 - y.y * s1);
                b.words[2 * part + i] = pack<T>(y.x * c0 + x.x * s0, y.y * c1 + x.y * s1);
            }
        }
        *low = a;
        *high = b;
    });
}

// Where the calling lane reads a fragment: row `row + lane_row`, chunk `chunk + lane_chunk`, for a multiple of 8 and an
// even number that are the same for all lanes. The lane's own part is kept apart, so that the addresses of all
// fragments of a tile are few registers and constants.
template <int D>
__device__ __forceinline__ const unsigned char* lane_address(unsigned char* tile, int row, int lane_row, int chunk,
                                                             int lane_chunk) {
    constexpr int chunks = Layout<D>::chunks;
    const int swizzled = lane_chunk ^ Layout<D>::permutation(lane_row);
    return tile + lane_row * chunks * 16 + (row * chunks + (chunk & ~7)) * 16 + ((chunk & 7) ^ swizzled) * 16;
}

// Operand fragments of a tile, 16 rows and 16 columns from (row, 8 * chunk) on.
// As A; and as B of a product over the tile's rows (with ldmatrix_transposed): to[0], to[1] are the first 8 columns.
template <int D>
__device__ __forceinline__ const unsigned char* lane_row(unsigned char* tile, int row, int chunk) {
    const int lane = threadIdx.x % 32;
    return lane_address<D>(tile, row, lane % 16, chunk, lane / 16);
}

// As B of a product over the tile's columns: to[0], to[1] are the first 8 rows.
template <int D>
__device__ __forceinline__ const unsigned char* lane_row_as_b(unsigned char* tile, int row, int chunk) {
    const int lane = threadIdx.x % 32;
    return lane_address<D>(tile, row, lane % 8 + lane / 16 * 8, chunk, lane / 8 % 2);
}

// c = A B^T over D columns, for 16 * m rows of A from `row` on and 8 * n rows of B.
template <class T, int D, int m, int n>
__device__ __forceinline__ void multiply_transposed(float (&c)[m][n][4], unsigned char* a_tile, int row,
                                                    unsigned char* b_tile) {
#pragma unroll
    for (int i = 0; i < m * n * 4; ++i) c[i / (4 * n)][i / 4 % n][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[m][4];
#pragma unroll
        for (int i = 0; i < m; ++i) ldmatrix(a[i], lane_row<D>(a_tile, row + 16 * i, 2 * k));
#pragma unroll
        for (int j = 0; j < n; j += 2) {
            uint32_t b[4];
            ldmatrix(b, lane_row_as_b<D>(b_tile, 8 * j, 2 * k));
#pragma unroll
            for (int i = 0; i < m; ++i) {
                mma<T>(c[i][j], a[i], b[0], b[1]);
                mma<T>(c[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Which columns of D a warp accumulates where `split` warps share them: of n groups of 8, half from each half of D, so
// that both channels of a rotated pair are in one thread. Group j of the warp is group column_group(j) of D.
template <int D, int split>
struct Columns {
    static constexpr int n = D / 8 / split;
    int part;

    __device__ int group(int j) const { return split == 1 ? j : part * (n / 2) + j + (j < n / 2 ? 0 : D / 16 - n / 2); }
};

// c += P B over the rows of B (8 * rows of them), P given as accumulators; P is rounded to T.
template <class T, int D, int split, int m, int rows>
__device__ __forceinline__ void accumulate(float (&c)[m][D / 8 / split][4], const float (&p)[m][rows][4],
                                           unsigned char* b_tile, Columns<D, split> columns) {
#pragma unroll
    for (int k = 0; k < rows / 2; ++k) {
        uint32_t a[m][4];
#pragma unroll
        for (int i = 0; i < m; ++i) {
            const float (&left)[4] = p[i][2 * k], (&right)[4] = p[i][2 * k + 1];
            a[i][0] = pack<T>(left[0], left[1]);
            a[i][1] = pack<T>(left[2], left[3]);
            a[i][2] = pack<T>(right[0], right[1]);
            a[i][3] = pack<T>(right[2], right[3]);
        }
#pragma unroll
        for (int j = 0; j < columns.n; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, lane_row<D>(b_tile, 16 * k, columns.group(j)));
#pragma unroll
            for (int i = 0; i < m; ++i) {
                mma<T>(c[i][j], a[i], b[0], b[1]);
                mma<T>(c[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Turns gradients of rotated rows, `count` pairs of groups of 8 columns, into those of the rows before rotation.
// Row i of the thread's two (lane / 4 + 8 i) is token `token + 8 i`; it exists if that is below end_token.
template <int D, int split>
__device__ __forceinline__ void rotate_back(float (&c)[D / 8 / split][4], Columns<D, split> columns, int32_t token,
                                            int32_t end_token, const Rotation& rotation) {
    if (rotation.cos == nullptr) return;
    constexpr int half = columns.n / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (token + 8 * i >= end_token) continue;
        const int64_t table_row = rotation.table_row(token + 8 * i) * (D / 2);
#pragma unroll
        for (int j = 0; j < half; ++j)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int64_t angle = table_row + 8 * columns.group(j) + 2 * (threadIdx.x % 4) + side;
                const float cos = rotation.cos[angle], sin = rotation.sin[angle];
                float &x = c[j][2 * i + side], &y = c[j + half][2 * i + side];
                const float before = x * cos + y * sin;
                y = y * cos - x * sin;
                x = before;
            }
    }
}

// Puts 16 rows of accumulators into the tile from `row` on.
template <class T, int D, int split, class L = Layout<D>>
__device__ __forceinline__ void stage(unsigned char* tile, int row, const float (&c)[D / 8 / split][4],
                                      Columns<D, split> columns) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < columns.n; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            unsigned char* chunk = L::address(tile, row + lane / 4 + 8 * i, columns.group(j));
            *reinterpret_cast<uint32_t*>(chunk + 4 * (lane % 4)) = pack<T>(c[j][2 * i], c[j][2 * i + 1]);
        }
}

// Writes the tile's rows row .. row + count - 1 that are below num_valid, shared among num_threads threads.
template <int D, class L = Layout<D>>
__device__ __forceinline__ void write_rows(const Heads& to, int64_t head, int32_t first_token, unsigned char* tile,
                                           int row, int count, int num_valid, int thread, int num_threads) {
    for (int i = thread; i < count * Layout<D>::chunks; i += num_threads) {
        const int r = row + i / Layout<D>::chunks, chunk = i % Layout<D>::chunks;
        if (r >= num_valid) break;
        const int64_t offset = int64_t{first_token + r} * to.token_stride + head * to.head_stride + 8 * chunk;
        *reinterpret_cast<Vec16*>(static_cast<unsigned char*>(to.data) + 2 * offset) =
            *reinterpret_cast<const Vec16*>(L::address(tile, r, chunk));
    }
}

}  // namespace meditron
