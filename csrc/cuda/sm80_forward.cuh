// Forward pass for sm_80 and later, with mma.sync: FlashAttention-2 (Dao, 2023) over the documents of a packed batch.
//
// A block of threads takes a tile of queries of one head and goes through the blocks of keys that it sees, from the
// last to the first. Each warp has 16 * m queries for itself. K of the next block is copied while the weights multiply
// V, and V while q multiplies K, so both have one buffer.

#pragma once

#include "launch.h"
#include "runtime.cuh"
#include "schedule.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace meditron {

template <int D>
struct ForwardShape {
    static constexpr int warps = 4;
    static constexpr int m = D <= 128 ? 2 : 1;
    static constexpr int block_keys = D <= 128 ? 64 : 32;
    static constexpr int tile_queries = 16 * m * warps;
    static constexpr int num_threads = 32 * warps;
    static constexpr int shared_bytes = Layout<D>::bytes(tile_queries + 2 * block_keys);
};

struct ForwardArguments {
    AttentionForward given;
    const Tile* tiles;
    int32_t window;
};

template <class T, int D>
__global__ void __launch_bounds__(ForwardShape<D>::num_threads)
    attention_forward_sm80(const __grid_constant__ ForwardArguments arguments) {
    using Shape = ForwardShape<D>;
    constexpr int m = Shape::m, n = Shape::block_keys / 8, num_threads = Shape::num_threads;
    const AttentionForward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const int num_heads = static_cast<int>(problem.num_heads);
    const int head = blockIdx.x % num_heads;
    const int kv_head = head / (num_heads / static_cast<int>(problem.num_kv_heads));
    const Tile tile = arguments.tiles[blockIdx.x / num_heads];
    const Sight sight = sight_of(tile, arguments.window);
    const float scale_log2 = problem.softmax_scale * log2_of_e;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * m;
    const int first_query = tile.row + warp_row, last_query = first_query + 16 * m - 1;

    unsigned char* const q_tile = shared_memory();
    unsigned char* const k_tile = q_tile + Layout<D>::bytes(Shape::tile_queries);
    unsigned char* const v_tile = k_tile + Layout<D>::bytes(Shape::block_keys);
    const Rows queries = rows_of(given.q, head, tile.query_start + tile.row, tile.num_queries - tile.row);
    const auto keys = [&](const Heads& heads, int block) {
        const int row = block * Shape::block_keys;
        return rows_of(heads, kv_head, tile.key_start + row, tile.num_keys - row);
    };

    float out[m][D / 8][4] = {};
    SoftmaxRow rows[m][2];
    start_copy<D, Shape::tile_queries, num_threads>(q_tile, queries);
    start_copy<D, Shape::block_keys, num_threads>(k_tile, keys(given.k, tile.end - 1));
    cp_async_commit();
    for (int block = tile.end - 1; block >= tile.begin; --block) {
        const int first_key = block * Shape::block_keys, last_key = first_key + Shape::block_keys - 1;
        const bool useful = sight.sees_some(first_query, last_query, first_key, last_key);

        cp_async_wait<0>();  // K has arrived
        if (block == tile.end - 1)
            rotate<T, D, Shape::tile_queries, num_threads>(q_tile, queries, rotation_of_queries(problem));
        rotate<T, D, Shape::block_keys, num_threads>(k_tile, keys(given.k, block), rotation_of_keys(problem));
        block_sync();  // all threads are done reading V
        start_copy<D, Shape::block_keys, num_threads>(v_tile, keys(given.v, block));
        cp_async_commit();

        float weights[m][n][4];
        if (useful) {
            multiply_transposed<T, D>(weights, q_tile, warp_row, k_tile);
            const bool masked = !sight.sees_all(first_query, last_query, first_key, last_key);
#pragma unroll
            for (int row = 0; row < 2 * m; ++row) {
                const int i = row / 2, side = row % 2;
                if (masked) {
                    const int query = first_query + 16 * i + lane / 4 + 8 * side;
#pragma unroll
                    for (int j = 0; j < 2 * n; ++j) {
                        const int key = first_key + j / 2 * 8 + 2 * (lane % 4) + j % 2;
                        float& score = weights[i][j / 2][2 * side + j % 2];
                        if (!sight.sees(query, key)) score = -INFINITY;
                    }
                }
                const float keep = rows[i][side].template update<2 * n>(
                    scale_log2, [&](int j) -> float& { return weights[i][j / 2][2 * side + j % 2]; });
#pragma unroll
                for (int j = 0; j < D / 8; ++j) {
                    out[i][j][2 * side] *= keep;
                    out[i][j][2 * side + 1] *= keep;
                }
            }
        }

        cp_async_wait<0>();  // V has arrived
        block_sync();        // all threads are done reading K
        if (block > tile.begin) start_copy<D, Shape::block_keys, num_threads>(k_tile, keys(given.k, block - 1));
        cp_async_commit();
        if (useful) accumulate<T, D, 1>(out, weights, v_tile, Columns<D, 1>{0});
    }

    // Only this warp reads its query rows, and it is done with them: their buffer takes the output.
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            SoftmaxRow& row = rows[i][side];
            row.finish();
            const float share = 1 / row.sum;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                out[i][j][2 * side] *= share;
                out[i][j][2 * side + 1] *= share;
            }
            const int query = first_query + 16 * i + lane / 4 + 8 * side;
            if (lane % 4 == 0 && query < tile.num_queries)
                given.lse[head * problem.num_queries + tile.query_start + query] =
                    row.log_sum_exp(problem.softmax_scale);
        }
        stage<T, D, 1>(q_tile, warp_row + 16 * i, out[i], Columns<D, 1>{0});
    }
    warp_sync();
    write_rows<D>(given.out, head, tile.query_start + tile.row, q_tile, warp_row, 16 * m, tile.num_queries - tile.row,
                  lane, 32);
}

template <class T, int D>
const char* launch_forward(const AttentionForward& given, void* workspace, void* stream) {
    using Shape = ForwardShape<D>;
    const auto tiles = query_tiles(given.problem, Shape::tile_queries, Shape::block_keys);
    if (const char* error = copy_to_device(workspace, tiles.data(), tiles.size() * sizeof(Tile), stream)) return error;
    const ForwardArguments arguments{given, static_cast<const Tile*>(workspace), window_or_all(given.problem)};
    const auto num_blocks = static_cast<unsigned>(tiles.size() * given.problem.num_heads);
    return launch(attention_forward_sm80<T, D>, num_blocks, Shape::num_threads, Shape::shared_bytes, stream, arguments);
}

}  // namespace meditron
