// Forward pass for sm_90a with wgmma, after FlashAttention-3 (Shah et al., 2024), over the documents of a packed batch.
//
// As many blocks of threads as there are multiprocessors, each of three warpgroups. The first one copies tiles of q,
// k and v into a ring of buffers, rotates q and k, and tells the other two, which have 64 queries of the tile each.
// Softmax of one block of keys goes along with the product of the weights of the block before. Copies are cp.async
// and not TMA, as they fill what lies beyond a document with zeros: its neighbor's NaN must not reach it.

#pragma once

#include "launch.h"
#include "sm90_tiles.cuh"
#include "softmax.cuh"

namespace meditron {

template <int D>
struct HopperForwardShape {
    static constexpr int rows = 128;  // of every tile and block
    static constexpr int num_threads = 384, stages = 2;
    using Tiles = Panels<D, rows>;

    enum Ring { q_ring, k_ring, v_ring, num_rings };

    static constexpr int barriers_at = num_rings * stages * Tiles::bytes;
    static constexpr int shared_bytes = barriers_at + num_rings * stages * 2 * static_cast<int>(sizeof(SharedBarrier));

    // Of the item with this number in its ring.
    __device__ static RingBuffer buffer(Ring ring, int item) {
        const int slot = ring * stages + item % stages;
        auto* const barriers = reinterpret_cast<SharedBarrier*>(shared_memory() + barriers_at) + 2 * slot;
        return {shared_memory() + slot * Tiles::bytes, barriers, barriers + 1, item / stages};
    }
};

struct HopperForwardArguments {
    AttentionForward given;
    const Tile* tiles;
    int32_t num_items, window;  // items: tiles times heads
};

// The warpgroup that copies. Tiles are handed over in this order, q, k, v, k, v ..., so who has waited for one has
// waited for those before it. Rings have two buffers and blocks come in turns of k and v, as Copies wants it.
template <class T, int D>
__device__ __forceinline__ void copy_for_forward(const HopperForwardArguments& arguments) {
    using Shape = HopperForwardShape<D>;
    const AttentionForward& given = arguments.given;
    const int num_heads = static_cast<int>(given.problem.num_heads);
    const int group_size = num_heads / static_cast<int>(given.problem.num_kv_heads);
    using CopiesOfTiles = Copies<T, D, Shape::rows, 2>;
    CopiesOfTiles copies(given.problem);
    const auto start = [&](const RingBuffer& buffer, const Rows& rows, typename CopiesOfTiles::Kind kind) {
        barrier_wait(buffer.empty, buffer.emptied());
        copies.start(buffer.tile, buffer.full, rows, kind);
    };
    int num_tiles = 0, num_blocks = 0;
    for_my_items(arguments.tiles, arguments.num_items, num_heads, [&](const Tile& tile, int head) {
        start(Shape::buffer(Shape::q_ring, num_tiles++),
              rows_of(given.q, head, tile.query_start + tile.row, tile.num_queries - tile.row), CopiesOfTiles::queries);
        for (int block = tile.end - 1; block >= tile.begin; --block, ++num_blocks) {
            const int row = block * Shape::rows, token = tile.key_start + row, num_valid = tile.num_keys - row;
            start(Shape::buffer(Shape::k_ring, num_blocks), rows_of(given.k, head / group_size, token, num_valid),
                  CopiesOfTiles::keys);
            start(Shape::buffer(Shape::v_ring, num_blocks), rows_of(given.v, head / group_size, token, num_valid),
                  CopiesOfTiles::plain);
        }
    });
    copies.finish();
}

// scores = q k^T, of 64 queries from `row` on.
template <class T, int D, int n>
__device__ __forceinline__ void start_scores(float (&scores)[n][4], const unsigned char* q_tile, int row,
                                             const unsigned char* k_tile) {
    using Tiles = typename HopperForwardShape<D>::Tiles;
    wgmma_fence();
#pragma unroll
    for (int column = 0; column < D; column += 16)
        wgmma_rows<T, 8 * n>(scores, Tiles::descriptor(q_tile, row, column), Tiles::descriptor(k_tile, 0, column),
                             column > 0);
    wgmma_commit();
}

// out += weights v
template <class T, int D, int n>
__device__ __forceinline__ void start_output(float (&out)[D / 8][4], const uint32_t (&weights)[n][4],
                                             const unsigned char* v_tile) {
    using Tiles = typename HopperForwardShape<D>::Tiles;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < n; ++i) wgmma_columns<T, D>(out, weights[i], Tiles::descriptor(v_tile, 16 * i, 0));
    wgmma_commit();
}

// The place of this thread in its warpgroup, one of the two that multiply.
struct ForwardPlace {
    int lane, group_row, warp_row;  // rows: of the tile, where the warpgroup and the warp begin

    __device__ static ForwardPlace mine() {
        const int group_row = (threadIdx.x / 128 - 1) * 64;
        return {static_cast<int>(threadIdx.x % 32), group_row,
                group_row + static_cast<int>(threadIdx.x % 128 / 32 * 16)};
    }
};

// What a thread holds of 64 queries: scores of one block of keys, their weights, and the sums so far. `keep` is the
// share of those sums that the block leaves, as its scores may raise the maximum.
template <class T, int D>
struct ForwardState {
    static constexpr int n = HopperForwardShape<D>::rows / 8;

    float out[D / 8][4] = {}, scores[n][4], keep[2];
    uint32_t weights[n / 2][4];
    SoftmaxRow rows[2];

    __device__ __forceinline__ void softmax(const Sight& sight, const ForwardPlace& place, int first_query,
                                            int first_key, float scale_log2) {
        const int query_of_lane = first_query + place.lane / 4;
        const bool masked =
            !sight.sees_all(first_query, first_query + 15, first_key, first_key + HopperForwardShape<D>::rows - 1);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            if (masked) {
#pragma unroll
                for (int j = 0; j < 2 * n; ++j) {
                    const int key = first_key + j / 2 * 8 + 2 * (place.lane % 4) + j % 2;
                    float& score = scores[j / 2][2 * side + j % 2];
                    if (!sight.sees(query_of_lane + 8 * side, key)) score = -INFINITY;
                }
            }
            keep[side] = rows[side].template update<2 * n>(
                scale_log2, [&](int j) -> float& { return scores[j / 2][2 * side + j % 2]; });
        }
    }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < 2 * n; ++i)
            weights[i / 4][i % 4] = pack<T>(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
    }

    __device__ __forceinline__ void rescale_output() {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i / 4][i % 4] *= keep[i % 4 / 2];
    }
};

// Once all of the warp have passed the wait for the products that read it.
__device__ __forceinline__ void give_back(const RingBuffer& buffer, int lane) {
    if (lane == 0) barrier_arrive(buffer.empty);
}

// Divides the output by the sums and writes it, with the logarithms of the sums. The group's query rows are no longer
// needed: their buffer takes the output.
template <class T, int D>
__device__ __forceinline__ void finish_tile(const AttentionForward& given, const Tile& tile, int head,
                                            const ForwardPlace& place, ForwardState<T, D>& state, const RingBuffer& q) {
    using Tiles = typename HopperForwardShape<D>::Tiles;
    const AttentionProblem& problem = given.problem;
    warpgroup_sync();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        state.rows[side].finish();
        const float share = 1 / state.rows[side].sum;
#pragma unroll
        for (int j = 0; j < D / 4; ++j) state.out[j / 2][2 * side + j % 2] *= share;
        const int query = tile.row + place.warp_row + place.lane / 4 + 8 * side;
        if (place.lane % 4 == 0 && query < tile.num_queries)
            given.lse[head * problem.num_queries + tile.query_start + query] =
                state.rows[side].log_sum_exp(problem.softmax_scale);
    }
    stage<T, D, 1, Tiles>(q.tile, place.warp_row, state.out, Columns<D, 1>{0});
    warp_sync();
    write_rows<D, Tiles>(given.out, head, tile.query_start + tile.row, q.tile, place.warp_row, 16,
                         tile.num_queries - tile.row, place.lane, 32);
    barrier_arrive(q.empty);
}

// One tile of queries and one head; `num_blocks` counts the blocks of keys that all tiles have used.
template <class T, int D>
__device__ __forceinline__ void attend_tile(const HopperForwardArguments& arguments, const Tile& tile, int head,
                                            const ForwardPlace& place, const RingBuffer& q, int& num_blocks) {
    using Shape = HopperForwardShape<D>;
    const float scale_log2 = arguments.given.problem.softmax_scale * log2_of_e;
    const Sight sight = sight_of(tile, arguments.window);
    const int first_query = tile.row + place.warp_row;
    ForwardState<T, D> state;

    RingBuffer k = Shape::buffer(Shape::k_ring, num_blocks);
    barrier_wait(k.full, k.filled());
    start_scores<T, D>(state.scores, q.tile, place.group_row, k.tile);
    wgmma_wait<0>(state.scores);
    give_back(k, place.lane);
    state.softmax(sight, place, first_query, (tile.end - 1) * Shape::rows, scale_log2);
    state.round_weights();
    for (int block = tile.end - 2; block >= tile.begin; --block) {
        const RingBuffer v = Shape::buffer(Shape::v_ring, num_blocks++);
        k = Shape::buffer(Shape::k_ring, num_blocks);
        barrier_wait(k.full, k.filled());
        start_scores<T, D>(state.scores, q.tile, place.group_row, k.tile);
        start_output<T, D>(state.out, state.weights, v.tile);
        wgmma_wait<1>(state.scores);
        give_back(k, place.lane);
        state.softmax(sight, place, first_query, block * Shape::rows, scale_log2);
        wgmma_wait<0>(state.out);
        give_back(v, place.lane);
        state.rescale_output();
        state.round_weights();
    }
    const RingBuffer v = Shape::buffer(Shape::v_ring, num_blocks++);
    barrier_wait(v.full, v.filled());
    start_output<T, D>(state.out, state.weights, v.tile);
    wgmma_wait<0>(state.out);
    give_back(v, place.lane);
    finish_tile<T, D>(arguments.given, tile, head, place, state, q);
}

// One of the two warpgroups that multiply.
template <class T, int D>
__device__ __forceinline__ void attend(const HopperForwardArguments& arguments) {
    using Shape = HopperForwardShape<D>;
    const ForwardPlace place = ForwardPlace::mine();
    int num_tiles = 0, num_blocks = 0;
    for_my_items(arguments.tiles, arguments.num_items, static_cast<int>(arguments.given.problem.num_heads),
                 [&](const Tile& tile, int head) {
                     const RingBuffer q = Shape::buffer(Shape::q_ring, num_tiles++);
                     attend_tile<T, D>(arguments, tile, head, place, q, num_blocks);
                 });
}

template <class T, int D>
__global__ void __launch_bounds__(HopperForwardShape<D>::num_threads, 1)
    attention_forward_sm90(const __grid_constant__ HopperForwardArguments arguments) {
    using Shape = HopperForwardShape<D>;
    constexpr int copying_threads = 128, multiplying_warps = 8;
    if (threadIdx.x == 0) {
        for (int ring = 0; ring < Shape::num_rings; ++ring)
            for (int i = 0; i < Shape::stages; ++i) {
                const RingBuffer buffer = Shape::buffer(static_cast<typename Shape::Ring>(ring), i);
                barrier_init(buffer.full, copying_threads);
                barrier_init(buffer.empty, ring == Shape::q_ring ? 32 * multiplying_warps : multiplying_warps);
            }
    }
    block_sync();
    if (threadIdx.x < copying_threads) {
        give_registers_back<56>();
        copy_for_forward<T, D>(arguments);
    } else {
        take_registers<224>();
        attend<T, D>(arguments);
    }
}

template <class T, int D>
const char* launch_forward_sm90(const AttentionForward& given, void* workspace, void* stream) {
    using Shape = HopperForwardShape<D>;
    const auto tiles = query_tiles(given.problem, Shape::rows, Shape::rows);
    if (const char* error = copy_to_device(workspace, tiles.data(), tiles.size() * sizeof(Tile), stream)) return error;
    const auto num_items = static_cast<int32_t>(tiles.size() * given.problem.num_heads);
    const HopperForwardArguments arguments{given, static_cast<const Tile*>(workspace), num_items,
                                           window_or_all(given.problem)};
    const auto num_blocks = static_cast<unsigned>(std::min(num_items, num_multiprocessors()));
    return launch(attention_forward_sm90<T, D>, num_blocks, Shape::num_threads, Shape::shared_bytes, stream, arguments);
}

}  // namespace meditron
