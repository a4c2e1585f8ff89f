// Who sees whom, and the softmax that goes along with the blocks of keys (Milakov and Gimelshein, 2018). Scores arrive
// as mma accumulators: the thread with lane = 4 * g + t has the rows g, g + 8 of 16 and of every 8 columns the columns
// 2t, 2t + 1.

#pragma once

#include <cmath>

#include "ptx.cuh"
#include "schedule.h"

namespace meditron {

constexpr float log2_of_e = 1.4426950408889634f;
constexpr float ln_of_2 = 0.6931471805599453f;

// Which queries of a document see which of its keys, both counted from its start.
struct Sight {
    int32_t ahead, window;  // query j stands at position ahead + j and sees the `window` keys up to there

    __device__ bool sees(int32_t query, int32_t key) const {
        return key <= ahead + query && key > ahead + query - window;
    }
    __device__ bool sees_some(int32_t first_query, int32_t last_query, int32_t first_key, int32_t last_key) const {
        return first_key <= ahead + last_query && last_key > ahead + first_query - window;
    }
    __device__ bool sees_all(int32_t first_query, int32_t last_query, int32_t first_key, int32_t last_key) const {
        return last_key <= ahead + first_query && first_key > ahead + last_query - window;
    }
};

__device__ inline Sight sight_of(const Tile& tile, int32_t window) {
    return {tile.num_keys - tile.num_queries, window};
}

// Over the four lanes that share a row.
__device__ inline float max_of_row(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

__device__ inline float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// The state of one row: the largest score so far and the sum of exp(scaled score - scaled largest). The sum is that of
// the thread's own columns until finish().
struct SoftmaxRow {
    float largest = -INFINITY, sum = 0;

    // Takes the scores of a block, values(j) for j < n, replaces them by their weights, and returns what the sums so
    // far have to be multiplied by. scale_log2 is the (positive) softmax scale times log2(e).
    template <int n, class Values>
    __device__ __forceinline__ float update(float scale_log2, Values values) {
        const float before = largest;
#pragma unroll
        for (int j = 0; j < n; ++j) largest = fmaxf(largest, values(j));
        largest = max_of_row(largest);
        // A row that has not seen any key yet: its weights shall be 0, not exp(-inf + inf).
        const float shift = largest == -INFINITY ? 0 : largest * scale_log2;
        const float keep = exp2_fast(before * scale_log2 - shift);
        sum *= keep;
#pragma unroll
        for (int j = 0; j < n; ++j) {
            values(j) = exp2_fast(values(j) * scale_log2 - shift);
            sum += values(j);
        }
        return keep;
    }

    __device__ __forceinline__ void finish() { sum = sum_of_row(sum); }
    __device__ float log_sum_exp(float softmax_scale) const { return largest * softmax_scale + logf(sum); }
};

}  // namespace meditron
