// Backward pass for sm_90a with wgmma, without atomic additions: repeated runs are bit-identical. The gradients are
// those of sm80_backward.cuh, with the same delta.
//
// One kernel for dK and dV, and one for dQ; they differ only in which tile stays and which passes by. A tile of 128 own
// rows (keys, or queries) stays in shared memory, 64 for each multiplying warpgroup; blocks of 64 other rows pass by.
// Own rows have two operands x, y (k and v, or q and grad_out), others as well: scores = x x'^T, slopes = y y'^T, and
// dx += scale * dS x', for keys also dy += P y'.

#pragma once

#include "sm80_backward.cuh"
#include "sm90_tiles.cuh"

namespace meditron {

// Compiled in sm80_backward_*.cu, for all GPUs: what includes this may be compiled for sm_90a alone, and the linker
// keeps one of two.
extern template const char* launch_delta<BFloat16, 64>(const AttentionBackward&, float*, void*);
extern template const char* launch_delta<Float16, 64>(const AttentionBackward&, float*, void*);
extern template const char* launch_delta<BFloat16, 128>(const AttentionBackward&, float*, void*);
extern template const char* launch_delta<Float16, 128>(const AttentionBackward&, float*, void*);

template <int D>
struct HopperBackwardShape {
    static constexpr int own_rows = 128, rows = 64, num_threads = 384, stages = 2;
    using Tiles = Panels<D, rows>;
    // An own tile: x of both warpgroups, y of both. A block: x', y', lse and delta of its queries.
    static constexpr int own_bytes = 4 * Tiles::bytes, block_tiles = 2 * Tiles::bytes, rows_bytes = 2 * rows * 4;
    static constexpr int blocks_at = stages * own_bytes, statistics_at = blocks_at + stages * block_tiles;
    static constexpr int barriers_at = statistics_at + stages * rows_bytes;
    static constexpr int shared_bytes = barriers_at + 4 * stages * static_cast<int>(sizeof(SharedBarrier));

    __device__ static RingBuffer own(int item) {
        const int slot = item % stages;
        auto* const barriers = reinterpret_cast<SharedBarrier*>(shared_memory() + barriers_at) + 2 * slot;
        return {shared_memory() + slot * own_bytes, barriers, barriers + 1, item / stages};
    }
    __device__ static RingBuffer block(int item) {
        const int slot = item % stages;
        auto* const barriers = reinterpret_cast<SharedBarrier*>(shared_memory() + barriers_at) + 2 * (stages + slot);
        return {shared_memory() + blocks_at + slot * block_tiles, barriers, barriers + 1, item / stages};
    }
    __device__ static float* lse_of_block(int item) {
        return reinterpret_cast<float*>(shared_memory() + statistics_at + item % stages * rows_bytes);
    }
};

struct HopperBackwardArguments {
    AttentionBackward given;
    const Tile* tiles;
    const float* delta;  // [N, T]
    int32_t num_items, window;
};

// What the kernel for keys (or else for queries) needs to know of a tile.
template <bool of_keys>
struct Passing {
    int32_t own_token, num_own, other_token, num_others;  // of the document
    int32_t num_blocks, num_steps, first_block, first_other_head, group_size;

    __device__ Passing(const AttentionProblem& problem, const Tile& tile, int own_head) {
        group_size = static_cast<int>(problem.num_heads / problem.num_kv_heads);
        own_token = of_keys ? tile.key_start : tile.query_start;
        num_own = of_keys ? tile.num_keys : tile.num_queries;
        other_token = of_keys ? tile.query_start : tile.key_start;
        num_others = of_keys ? tile.num_queries : tile.num_keys;
        first_block = tile.begin;
        num_blocks = tile.end - tile.begin;
        num_steps = of_keys ? num_blocks * group_size : num_blocks;
        first_other_head = of_keys ? own_head * group_size : own_head / group_size;
    }
    // All blocks of the group's first head, then those of the second.
    __device__ int head(int step) const { return of_keys ? first_other_head + step / num_blocks : first_other_head; }
    __device__ int first_other(int step) const { return (first_block + (of_keys ? step % num_blocks : step)) * 64; }
};

template <bool of_keys>
__device__ __forceinline__ int num_own_heads(const AttentionProblem& problem) {
    return static_cast<int>(of_keys ? problem.num_kv_heads : problem.num_heads);
}

// Own tiles are handed over before their first block, so who has waited for that one need not wait for them.
template <class T, int D, bool of_keys>
__device__ __forceinline__ void copy_for_backward(const HopperBackwardArguments& arguments) {
    using Shape = HopperBackwardShape<D>;
    constexpr int tile_bytes = Shape::Tiles::bytes;
    const AttentionBackward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const Heads &x = of_keys ? given.k : given.q, &y = of_keys ? given.v : given.grad_out;
    const Heads &other_x = of_keys ? given.q : given.k, &other_y = of_keys ? given.grad_out : given.v;
    using CopiesOfTiles = Copies<T, D, Shape::rows, 1>;
    constexpr auto own_kind = of_keys ? CopiesOfTiles::keys : CopiesOfTiles::queries;
    constexpr auto other_kind = of_keys ? CopiesOfTiles::queries : CopiesOfTiles::keys;
    CopiesOfTiles copies(problem);
    int num_tiles = 0, num_blocks = 0;
    for_my_items(
        arguments.tiles, arguments.num_items, num_own_heads<of_keys>(problem), [&](const Tile& tile, int head) {
            const Passing<of_keys> passing(problem, tile, head);
            if (passing.num_steps == 0) return;
            const RingBuffer own = Shape::own(num_tiles++);
            barrier_wait(own.empty, own.emptied());
            for (int part = 0; part < 4; ++part) {
                const int row = tile.row + part % 2 * Shape::rows;
                const bool exists = row < passing.num_own;
                copies.start(own.tile + part * tile_bytes, own.full,
                             rows_of(part < 2 ? x : y, head, passing.own_token + (exists ? row : 0),
                                     exists ? passing.num_own - row : 0),
                             part < 2 ? own_kind : CopiesOfTiles::plain);
            }
            for (int step = 0; step < passing.num_steps; ++step, ++num_blocks) {
                const RingBuffer block = Shape::block(num_blocks);
                const int row = passing.first_other(step), other_head = passing.head(step);
                const int token = passing.other_token + row, num_valid = passing.num_others - row;
                barrier_wait(block.empty, block.emptied());
                if (of_keys && threadIdx.x < Shape::rows) {
                    float* const lse = Shape::lse_of_block(num_blocks) + threadIdx.x;
                    const bool valid = static_cast<int>(threadIdx.x) < num_valid;
                    const int64_t at = other_head * problem.num_queries + token + (valid ? threadIdx.x : 0);
                    cp_async_4(lse, given.lse + at, valid);
                    cp_async_4(lse + Shape::rows, arguments.delta + at, valid);
                }
                copies.start(block.tile, block.full, rows_of(other_x, other_head, token, num_valid), other_kind);
                copies.start(block.tile + tile_bytes, block.full, rows_of(other_y, other_head, token, num_valid),
                             CopiesOfTiles::plain);
            }
        });
    copies.finish();
}

// c = a b^T, 64 x 64
template <class T, int D>
__device__ __forceinline__ void start_rows_product(float (&c)[8][4], const unsigned char* a, const unsigned char* b) {
    using Tiles = typename HopperBackwardShape<D>::Tiles;
    wgmma_fence();
#pragma unroll
    for (int column = 0; column < D; column += 16)
        wgmma_rows<T, 64>(c, Tiles::descriptor(a, 0, column), Tiles::descriptor(b, 0, column), column > 0);
    wgmma_commit();
}

// c += a b
template <class T, int D>
__device__ __forceinline__ void start_columns_product(float (&c)[D / 8][4], const uint32_t (&a)[4][4],
                                                      const unsigned char* b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_columns<T, D>(c, a[i], HopperBackwardShape<D>::Tiles::descriptor(b, 16 * i, 0));
    wgmma_commit();
}

template <class T>
__device__ __forceinline__ void round_to_operand(uint32_t (&to)[4][4], const float (&from)[8][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) to[i / 4][i % 4] = pack<T>(from[i / 2][i % 2 * 2], from[i / 2][i % 2 * 2 + 1]);
}

template <class T, int D, bool of_keys>
__device__ __forceinline__ void sum_gradients(const HopperBackwardArguments& arguments) {
    using Shape = HopperBackwardShape<D>;
    using Tiles = typename Shape::Tiles;
    const AttentionBackward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const float scale_log2 = problem.softmax_scale * log2_of_e;
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1, warp_row = threadIdx.x % 128 / 32 * 16;
    const Columns<D, 1> columns{0};
    int num_tiles = 0, num_blocks = 0;
    for_my_items(
        arguments.tiles, arguments.num_items, num_own_heads<of_keys>(problem), [&](const Tile& tile, int head) {
            const Passing<of_keys> passing(problem, tile, head);
            const Sight sight = sight_of(tile, arguments.window);
            const int group_row = tile.row + group * Shape::rows, first_own = group_row + warp_row;
            const int own_of_lane = first_own + lane / 4;
            const RingBuffer own = Shape::own(num_tiles);
            unsigned char* const x_tile = own.tile + group * Tiles::bytes;
            unsigned char* const y_tile = x_tile + 2 * Tiles::bytes;
            float dx[D / 8][4] = {}, dy[D / 8][4] = {};
            float own_shift[2] = {}, own_delta[2] = {};  // of the thread's two queries
#pragma unroll
            for (int side = 0; side < 2 && !of_keys; ++side) {
                const int query = own_of_lane + 8 * side;
                const int64_t at = head * problem.num_queries + passing.own_token + query;
                if (query < passing.num_own) {
                    own_shift[side] = given.lse[at] * log2_of_e;
                    own_delta[side] = arguments.delta[at];
                }
            }
            for (int step = 0; step < passing.num_steps; ++step, ++num_blocks) {
                const RingBuffer block = Shape::block(num_blocks);
                const unsigned char* const other_y = block.tile + Tiles::bytes;
                const int first_other = passing.first_other(step), last_other = first_other + Shape::rows - 1;
                const bool masked = of_keys ? !sight.sees_all(first_other, last_other, first_own, first_own + 15)
                                            : !sight.sees_all(first_own, first_own + 15, first_other, last_other);
                float scores[8][4], slopes[8][4];
                uint32_t operand[4][4];
                barrier_wait(block.full, block.filled());
                start_rows_product<T, D>(scores, x_tile, block.tile);
                start_rows_product<T, D>(slopes, y_tile, other_y);
                wgmma_wait<1>(scores);
                const float* const lse = Shape::lse_of_block(num_blocks);
#pragma unroll
                for (int j = 0; j < 32; ++j) {
                    const int column = j / 4 * 8 + 2 * (lane % 4) + j % 2, side = j % 4 / 2;
                    float& weight = scores[j / 4][j % 4];
                    weight = exp2_fast(weight * scale_log2 - (of_keys ? lse[column] * log2_of_e : own_shift[side]));
                    const int mine = own_of_lane + 8 * side, other = first_other + column;
                    if (masked && !(of_keys ? sight.sees(other, mine) : sight.sees(mine, other))) weight = 0;
                }
                wgmma_wait<0>(slopes);
                if (of_keys) {
                    round_to_operand<T>(operand, scores);
                    start_columns_product<T, D>(dy, operand, other_y);
                }
            // Rows of keys take the weights as they were rounded: both at once are more than there are registers.
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int j = i / 2, side = i % 2, column = 8 * j + 2 * (lane % 4);
                    float &first = slopes[j][2 * side], &second = slopes[j][2 * side + 1];
                    const Float2 weight = of_keys ? unpack<T>(operand[i / 4][i % 4])
                                                  : Float2{scores[j][2 * side], scores[j][2 * side + 1]};
                    first = weight.x * (first - (of_keys ? lse[Shape::rows + column] : own_delta[side]));
                    second = weight.y * (second - (of_keys ? lse[Shape::rows + column + 1] : own_delta[side]));
                }
                if (of_keys) wgmma_wait<0>(dy);
                round_to_operand<T>(operand, slopes);
                start_columns_product<T, D>(dx, operand, block.tile);
                wgmma_wait<0>(dx);
                if (lane == 0) barrier_arrive(block.empty);
            }

            const int32_t token = passing.own_token + own_of_lane, end_token = passing.own_token + passing.num_own;
            rotate_back<D, 1>(dx, columns, token, end_token,
                              of_keys ? rotation_of_keys(problem) : rotation_of_queries(problem));
#pragma unroll
            for (int j = 0; j < D / 2; ++j) dx[j / 4][j % 4] *= problem.softmax_scale;
            const int num_valid = passing.num_own - group_row;
            const auto write = [&](const Heads& to, unsigned char* through, const float (&values)[D / 8][4]) {
                stage<T, D, 1, Tiles>(through, warp_row, values, columns);
                warp_sync();
                write_rows<D, Tiles>(to, head, passing.own_token + group_row, through, warp_row, 16, num_valid, lane,
                                     32);
            };
            if (passing.num_steps > 0) {
                // The group's own rows are no longer needed: their buffer takes the gradients.
                warpgroup_sync();
                write(of_keys ? given.dk : given.dq, x_tile, dx);
                if (of_keys) write(given.dv, y_tile, dy);
                barrier_arrive(own.empty);
                ++num_tiles;
            } else {
                // Keys that no query sees: zeros, without a buffer.
                for (int i = lane; i < 16 * (D / 8); i += 32) {
                    const int row = warp_row + i / (D / 8);
                    if (row >= num_valid) break;
                    for (const Heads* to : {&given.dk, &given.dv}) {
                        const int64_t at = int64_t{passing.own_token + group_row + row} * to->token_stride +
                                           head * to->head_stride + i % (D / 8) * 8;
                        *reinterpret_cast<Vec16*>(static_cast<unsigned char*>(to->data) + 2 * at) = Vec16{};
                    }
                }
            }
        });
}

template <class T, int D, bool of_keys>
__global__ void __launch_bounds__(HopperBackwardShape<D>::num_threads, 1)
    attention_backward_sm90(const __grid_constant__ HopperBackwardArguments arguments) {
    using Shape = HopperBackwardShape<D>;
    constexpr int copying_threads = 128, multiplying_warps = 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::stages; ++i) {
            barrier_init(Shape::own(i).full, 4 * copying_threads);
            barrier_init(Shape::own(i).empty, 32 * multiplying_warps);
            barrier_init(Shape::block(i).full, 2 * copying_threads);
            barrier_init(Shape::block(i).empty, multiplying_warps);
        }
    }
    block_sync();
    if (threadIdx.x < copying_threads) {
        give_registers_back<56>();
        copy_for_backward<T, D, of_keys>(arguments);
    } else {
        take_registers<224>();
        sum_gradients<T, D, of_keys>(arguments);
    }
}

template <class T, int D>
const char* launch_backward_sm90(const AttentionBackward& given, void* workspace, void* stream) {
    using Shape = HopperBackwardShape<D>;
    const AttentionProblem& problem = given.problem;
    const BackwardWorkspace<D> room(problem);
    auto* const memory = static_cast<unsigned char*>(workspace);
    auto* const delta = reinterpret_cast<float*>(memory);
    if (const char* error = launch_delta<T, D>(given, delta, stream)) return error;
    const auto pass = [&](auto kernel, const std::vector<Tile>& tiles, int64_t offset, int64_t heads) -> const char* {
        if (const char* error = copy_to_device(memory + offset, tiles.data(), tiles.size() * sizeof(Tile), stream))
            return error;
        const auto num_items = static_cast<int32_t>(tiles.size() * heads);
        const HopperBackwardArguments arguments{given, reinterpret_cast<const Tile*>(memory + offset), delta, num_items,
                                                window_or_all(problem)};
        const auto num_blocks = static_cast<unsigned>(std::min(num_items, num_multiprocessors()));
        return launch(kernel, num_blocks, Shape::num_threads, Shape::shared_bytes, stream, arguments);
    };
    if (const char* error = pass(attention_backward_sm90<T, D, true>, key_tiles(problem, Shape::own_rows, Shape::rows),
                                 room.key_tiles, problem.num_kv_heads))
        return error;
    return pass(attention_backward_sm90<T, D, false>, query_tiles(problem, Shape::own_rows, Shape::rows),
                room.query_tiles, problem.num_heads);
}

}  // namespace meditron
