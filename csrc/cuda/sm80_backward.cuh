// Backward pass for sm_80 and later, with mma.sync, without atomic additions: repeated runs are bit-identical.
//
// Three kernels. The first sums out * grad_out by rows. The second takes a tile of keys of one kv head through all
// queries that see it, of all heads of its group in order, for dK and dV; it works on transposed scores (keys by
// queries), so that the accumulators of one product are the operand of the next and weights never pass through shared
// memory. The third takes a tile of queries through the keys it sees, for dQ. Computing the scores twice costs two of
// seven products.
//
// weights P = exp(scale * q k - lse), dP = grad_out v, dS = P (dP - delta), dV = P^T grad_out, dK = scale * dS^T q,
// dQ = scale * dS k.

#pragma once

#include "launch.h"
#include "runtime.cuh"
#include "schedule.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace meditron {

struct BackwardArguments {
    AttentionBackward given;
    const Tile* tiles;
    float* delta;  // [N, T]
    int32_t window;
};

// ---- delta

template <int D>
struct DeltaShape {
    static constexpr int num_threads = 256, lanes_per_row = 8;
    static constexpr int rows = num_threads / lanes_per_row;
};

template <class T, int D>
__global__ void __launch_bounds__(DeltaShape<D>::num_threads)
    attention_delta_sm80(const __grid_constant__ BackwardArguments arguments) {
    const AttentionBackward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const int64_t row = int64_t{blockIdx.x} * DeltaShape<D>::rows + threadIdx.x / DeltaShape<D>::lanes_per_row;
    const bool exists = row < problem.num_queries * problem.num_heads;
    const auto token = static_cast<int32_t>(exists ? row / problem.num_heads : 0);
    const int64_t head = exists ? row % problem.num_heads : 0;
    const auto* out = reinterpret_cast<const Vec16*>(rows_of(given.out, head, token, 1).first);
    const auto* grad_out = reinterpret_cast<const Vec16*>(rows_of(given.grad_out, head, token, 1).first);
    float sum = 0;
    for (int chunk = threadIdx.x % DeltaShape<D>::lanes_per_row; chunk < D / 8; chunk += DeltaShape<D>::lanes_per_row) {
        const Vec16 a = out[chunk], b = grad_out[chunk];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Float2 x = unpack<T>(a.words[i]), y = unpack<T>(b.words[i]);
            sum += x.x * y.x + x.y * y.y;
        }
    }
    sum = sum_of_row(sum);
    sum += shuffle_xor(sum, 4);
    if (exists && threadIdx.x % DeltaShape<D>::lanes_per_row == 0)
        arguments.delta[head * problem.num_queries + token] = sum;
}

// ---- dK and dV

template <int D>
struct KeyGradShape {
    static constexpr int warps = D <= 64 ? 4 : 8;
    static constexpr int split = D <= 128 ? 1 : 2;  // warps that share 16 keys, each with part of D to accumulate
    static constexpr int block_queries = D <= 128 ? 64 : 32;
    static constexpr int tile_keys = 16 * warps / split;
    static constexpr int num_threads = 32 * warps;
    static constexpr int block_bytes = Layout<D>::bytes(2 * block_queries) + 2 * block_queries * 4;
    static constexpr int shared_bytes = Layout<D>::bytes(2 * tile_keys) + 2 * block_bytes;
};

template <class T, int D>
__global__ void __launch_bounds__(KeyGradShape<D>::num_threads)
    attention_key_grad_sm80(const __grid_constant__ BackwardArguments arguments) {
    using Shape = KeyGradShape<D>;
    constexpr int n = Shape::block_queries / 8, split = Shape::split, num_threads = Shape::num_threads;
    const AttentionBackward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const int num_kv_heads = static_cast<int>(problem.num_kv_heads);
    const int group_size = static_cast<int>(problem.num_heads) / num_kv_heads;
    const int kv_head = blockIdx.x % num_kv_heads;
    const Tile tile = arguments.tiles[blockIdx.x / num_kv_heads];
    const Sight sight = sight_of(tile, arguments.window);
    const float scale_log2 = problem.softmax_scale * log2_of_e;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / split * 16;
    const Columns<D, split> columns{warp % split};
    const int first_key = tile.row + warp_row;

    unsigned char* const k_tile = shared_memory();
    unsigned char* const v_tile = k_tile + Layout<D>::bytes(Shape::tile_keys);
    unsigned char* const buffers = v_tile + Layout<D>::bytes(Shape::tile_keys);
    struct Buffer {
        unsigned char *q, *grad_out;
        float *lse, *delta;
    };
    const auto buffer = [&](int step) -> Buffer {
        unsigned char* const q = buffers + step % 2 * Shape::block_bytes;
        unsigned char* const grad_out = q + Layout<D>::bytes(Shape::block_queries);
        auto* const lse = reinterpret_cast<float*>(grad_out + Layout<D>::bytes(Shape::block_queries));
        return {q, grad_out, lse, lse + Shape::block_queries};
    };
    const Rows keys = rows_of(given.k, kv_head, tile.key_start + tile.row, tile.num_keys - tile.row);
    const Rows values = rows_of(given.v, kv_head, tile.key_start + tile.row, tile.num_keys - tile.row);
    // All blocks of the group's first head, then those of the second.
    const int num_blocks = tile.end - tile.begin, num_steps = num_blocks * group_size;
    const auto head_of = [&](int step) { return kv_head * group_size + step / num_blocks; };
    const auto first_query_of = [&](int step) { return (tile.begin + step % num_blocks) * Shape::block_queries; };
    const auto queries = [&](const Heads& heads, int step) {
        const int row = first_query_of(step);
        return rows_of(heads, head_of(step), tile.query_start + row, tile.num_queries - row);
    };
    const auto start_step = [&](int step) {
        const Buffer to = buffer(step);
        start_copy<D, Shape::block_queries, num_threads>(to.q, queries(given.q, step));
        start_copy<D, Shape::block_queries, num_threads>(to.grad_out, queries(given.grad_out, step));
        const int query = first_query_of(step) + threadIdx.x;
        if (threadIdx.x < Shape::block_queries) {
            const bool valid = query < tile.num_queries;
            const int64_t row = head_of(step) * problem.num_queries + tile.query_start + (valid ? query : 0);
            cp_async_4(to.lse + threadIdx.x, given.lse + row, valid);
            cp_async_4(to.delta + threadIdx.x, arguments.delta + row, valid);
        }
        cp_async_commit();
    };

    float dk[1][columns.n][4] = {}, dv[1][columns.n][4] = {};
    if (num_steps > 0) {
        start_copy<D, Shape::tile_keys, num_threads>(k_tile, keys);
        start_copy<D, Shape::tile_keys, num_threads>(v_tile, values);
        start_step(0);
    }
    for (int step = 0; step < num_steps; ++step) {
        const Buffer from = buffer(step);
        cp_async_wait<0>();
        if (step == 0) rotate<T, D, Shape::tile_keys, num_threads>(k_tile, keys, rotation_of_keys(problem));
        rotate<T, D, Shape::block_queries, num_threads>(from.q, queries(given.q, step), rotation_of_queries(problem));
        block_sync();  // this step's tiles are complete, and the other buffer is free
        if (step + 1 < num_steps) start_step(step + 1);

        const int first_query = first_query_of(step), last_query = first_query + Shape::block_queries - 1;
        if (!sight.sees_some(first_query, last_query, first_key, first_key + 15)) continue;
        float weights[1][n][4], slopes[1][n][4];
        multiply_transposed<T, D>(weights, k_tile, warp_row, from.q);
        multiply_transposed<T, D>(slopes, v_tile, warp_row, from.grad_out);
        const bool masked = !sight.sees_all(first_query, last_query, first_key, first_key + 15);
#pragma unroll
        for (int j = 0; j < 4 * n; ++j) {
            const int column = j / 4 * 8 + 2 * (lane % 4) + j % 2;
            float &weight = weights[0][j / 4][j % 4], &slope = slopes[0][j / 4][j % 4];
            weight = exp2_fast(weight * scale_log2 - from.lse[column] * log2_of_e);
            slope = weight * (slope - from.delta[column]);
            if (masked && !sight.sees(first_query + column, first_key + lane / 4 + j % 4 / 2 * 8)) weight = slope = 0;
        }
        accumulate<T, D, split>(dv, weights, from.grad_out, columns);
        accumulate<T, D, split>(dk, slopes, from.q, columns);
    }

    const int32_t end_token = tile.key_start + tile.num_keys;
    rotate_back<D, split>(dk[0], columns, tile.key_start + first_key + lane / 4, end_token, rotation_of_keys(problem));
#pragma unroll
    for (int j = 0; j < 4 * columns.n; ++j) dk[0][j / 4][j % 4] *= problem.softmax_scale;
    // Only the `split` warps of these rows read the rows of k and v that a warp multiplies with, and they are done.
    if (split > 1) block_sync();
    stage<T, D, split>(k_tile, warp_row, dk[0], columns);
    stage<T, D, split>(v_tile, warp_row, dv[0], columns);
    if (split > 1)
        block_sync();
    else
        warp_sync();
    const int share = threadIdx.x % (32 * split), num_valid = tile.num_keys - tile.row;
    write_rows<D>(given.dk, kv_head, tile.key_start + tile.row, k_tile, warp_row, 16, num_valid, share, 32 * split);
    write_rows<D>(given.dv, kv_head, tile.key_start + tile.row, v_tile, warp_row, 16, num_valid, share, 32 * split);
}

// ---- dQ

template <int D>
struct QueryGradShape {
    static constexpr int warps = D <= 64 ? 4 : D <= 128 ? 8 : 4;
    static constexpr int block_keys = D <= 128 ? 64 : 32;
    static constexpr int tile_queries = 16 * warps;
    static constexpr int num_threads = 32 * warps;
    static constexpr int block_bytes = Layout<D>::bytes(2 * block_keys);
    static constexpr int shared_bytes = Layout<D>::bytes(2 * tile_queries) + 2 * block_bytes;
};

// One block on a multiprocessor is all that is asked for: ptxas would spill to make room for a third one.
template <class T, int D>
__global__ void __launch_bounds__(QueryGradShape<D>::num_threads, 1)
    attention_query_grad_sm80(const __grid_constant__ BackwardArguments arguments) {
    using Shape = QueryGradShape<D>;
    constexpr int n = Shape::block_keys / 8, num_threads = Shape::num_threads;
    const AttentionBackward& given = arguments.given;
    const AttentionProblem& problem = given.problem;
    const int num_heads = static_cast<int>(problem.num_heads);
    const int head = blockIdx.x % num_heads;
    const int kv_head = head / (num_heads / static_cast<int>(problem.num_kv_heads));
    const Tile tile = arguments.tiles[blockIdx.x / num_heads];
    const Sight sight = sight_of(tile, arguments.window);
    const float scale_log2 = problem.softmax_scale * log2_of_e;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const int first_query = tile.row + warp_row, last_query = first_query + 15;

    unsigned char* const q_tile = shared_memory();
    unsigned char* const grad_out_tile = q_tile + Layout<D>::bytes(Shape::tile_queries);
    unsigned char* const buffers = grad_out_tile + Layout<D>::bytes(Shape::tile_queries);
    const auto k_buffer = [&](int block) { return buffers + block % 2 * Shape::block_bytes; };
    const auto v_buffer = [&](int block) { return k_buffer(block) + Layout<D>::bytes(Shape::block_keys); };
    const Rows queries = rows_of(given.q, head, tile.query_start + tile.row, tile.num_queries - tile.row);
    const auto keys = [&](const Heads& heads, int block) {
        const int row = block * Shape::block_keys;
        return rows_of(heads, kv_head, tile.key_start + row, tile.num_keys - row);
    };
    const auto start_block = [&](int block) {
        start_copy<D, Shape::block_keys, num_threads>(k_buffer(block), keys(given.k, block));
        start_copy<D, Shape::block_keys, num_threads>(v_buffer(block), keys(given.v, block));
        cp_async_commit();
    };

    float shift[2], delta[2];  // of the thread's two rows
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const int query = first_query + lane / 4 + 8 * side;
        const int64_t row = head * problem.num_queries + tile.query_start + query;
        shift[side] = query < tile.num_queries ? given.lse[row] * log2_of_e : 0;
        delta[side] = query < tile.num_queries ? arguments.delta[row] : 0;
    }
    float dq[1][D / 8][4] = {};
    start_copy<D, Shape::tile_queries, num_threads>(q_tile, queries);
    start_copy<D, Shape::tile_queries, num_threads>(
        grad_out_tile, rows_of(given.grad_out, head, tile.query_start + tile.row, tile.num_queries - tile.row));
    start_block(tile.begin);
    for (int block = tile.begin; block < tile.end; ++block) {
        cp_async_wait<0>();
        if (block == tile.begin)
            rotate<T, D, Shape::tile_queries, num_threads>(q_tile, queries, rotation_of_queries(problem));
        rotate<T, D, Shape::block_keys, num_threads>(k_buffer(block), keys(given.k, block), rotation_of_keys(problem));
        block_sync();  // this block's tiles are complete, and the other buffer is free
        if (block + 1 < tile.end) start_block(block + 1);

        const int first_key = block * Shape::block_keys, last_key = first_key + Shape::block_keys - 1;
        if (!sight.sees_some(first_query, last_query, first_key, last_key)) continue;
        float weights[1][n][4], slopes[1][n][4];
        multiply_transposed<T, D>(weights, q_tile, warp_row, k_buffer(block));
        multiply_transposed<T, D>(slopes, grad_out_tile, warp_row, v_buffer(block));
        const bool masked = !sight.sees_all(first_query, last_query, first_key, last_key);
#pragma unroll
        for (int j = 0; j < 4 * n; ++j) {
            const int side = j % 4 / 2;
            float& slope = slopes[0][j / 4][j % 4];
            slope = exp2_fast(weights[0][j / 4][j % 4] * scale_log2 - shift[side]) * (slope - delta[side]);
            const int query = first_query + lane / 4 + 8 * side;
            if (masked && !sight.sees(query, first_key + j / 4 * 8 + 2 * (lane % 4) + j % 2)) slope = 0;
        }
        accumulate<T, D, 1>(dq, slopes, k_buffer(block), Columns<D, 1>{0});
    }

    const int32_t token = tile.query_start + first_query + lane / 4, end_token = tile.query_start + tile.num_queries;
    rotate_back<D, 1>(dq[0], Columns<D, 1>{0}, token, end_token, rotation_of_queries(problem));
#pragma unroll
    for (int j = 0; j < D / 2; ++j) dq[0][j / 4][j % 4] *= problem.softmax_scale;
    // Only this warp reads its query rows, and it is done with them.
    stage<T, D, 1>(q_tile, warp_row, dq[0], Columns<D, 1>{0});
    warp_sync();
    write_rows<D>(given.dq, head, tile.query_start + tile.row, q_tile, warp_row, 16, tile.num_queries - tile.row, lane,
                  32);
}

// ---- launching

// delta, the tiles of keys, the tiles of queries: their places in the workspace.
template <int D>
struct BackwardWorkspace {
    int64_t key_tiles, query_tiles, end;

    explicit BackwardWorkspace(const AttentionProblem& problem) {
        const auto room_for = [&](int64_t num_tokens, int64_t tile_rows) {
            return max_num_tiles(num_tokens, problem.num_documents, tile_rows) * int64_t{sizeof(Tile)};
        };
        key_tiles = (problem.num_heads * problem.num_queries * 4 + 15) / 16 * 16;
        query_tiles = key_tiles + room_for(problem.num_keys, KeyGradShape<D>::tile_keys);
        end = query_tiles + room_for(problem.num_queries, QueryGradShape<D>::tile_queries);
    }
};

template <class T, int D>
const char* launch_delta(const AttentionBackward& given, float* delta, void* stream) {
    constexpr int rows = DeltaShape<D>::rows;
    const int64_t num_blocks = (given.problem.num_queries * given.problem.num_heads + rows - 1) / rows;
    return launch(attention_delta_sm80<T, D>, static_cast<unsigned>(num_blocks), DeltaShape<D>::num_threads, 0, stream,
                  BackwardArguments{given, nullptr, delta, 0});
}

template <class T, int D>
const char* launch_backward(const AttentionBackward& given, void* workspace, void* stream) {
    using Keys = KeyGradShape<D>;
    using Queries = QueryGradShape<D>;
    const AttentionProblem& problem = given.problem;
    const BackwardWorkspace<D> room(problem);
    auto* const memory = static_cast<unsigned char*>(workspace);
    BackwardArguments arguments{given, nullptr, reinterpret_cast<float*>(memory), window_or_all(problem)};

    if (const char* error = launch_delta<T, D>(given, arguments.delta, stream)) return error;

    const auto pass = [&](auto kernel, const std::vector<Tile>& tiles, int64_t offset, int64_t heads, int num_threads,
                          int shared_bytes) -> const char* {
        if (const char* error = copy_to_device(memory + offset, tiles.data(), tiles.size() * sizeof(Tile), stream))
            return error;
        arguments.tiles = reinterpret_cast<const Tile*>(memory + offset);
        const auto num_blocks = static_cast<unsigned>(tiles.size() * heads);
        return launch(kernel, num_blocks, num_threads, shared_bytes, stream, arguments);
    };
    if (const char* error =
            pass(attention_key_grad_sm80<T, D>, key_tiles(problem, Keys::tile_keys, Keys::block_queries),
                 room.key_tiles, problem.num_kv_heads, Keys::num_threads, Keys::shared_bytes))
        return error;
    return pass(attention_query_grad_sm80<T, D>, query_tiles(problem, Queries::tile_queries, Queries::block_keys),
                room.query_tiles, problem.num_heads, Queries::num_threads, Queries::shared_bytes);
}

}  // namespace meditron
