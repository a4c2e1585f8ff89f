// What a backend of packed attention is given. Plain C++: no torch, no CUDA headers, so that CPU and CUDA code,
// their tests and their emulation all speak of the same thing.
//
// Legend: T query tokens, S key/value tokens, N query heads, K key/value heads (N a multiple of K), D head size,
// P rows of the rotation tables. Strides are in elements; the channels of one head are contiguous.

#pragma once

#include <cstdint>

#include "../dtype.h"

namespace meditron {

// One of q [T, N, D], k, v [S, K, D], out or a gradient of them.
struct Heads {
    void* data;
    int64_t token_stride, head_stride;
};

// Causal attention inside each document. Document i has the queries cu_queries[i] .. cu_queries[i+1] and the keys
// cu_keys[i] .. cu_keys[i+1]; with more keys than queries its queries are the last ones: query j of n sees keys
// 0 .. m-n+j of its m, and with a window w > 0 only the last w of those. The caller has checked that boundaries start
// at 0, do not decrease and end at T and S, and that no document has more queries than keys.
struct AttentionProblem {
    DType dtype;
    int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim, num_documents;
    const int64_t *cu_queries, *cu_keys;  // [num_documents + 1], in host memory also for CUDA
    int64_t window;                       // 0: none
    float softmax_scale;
    // Rotary embedding of q and k before the product, in the half-rotation layout: channel pairs (c, c + D/2) turn by
    // the angle of a row of cos, sin [P, D/2] (fp32, contiguous). Token t takes row q_positions[t] or
    // k_positions[t] ([T], [S], int64), row t where these are null. cos null: no rotation.
    const float *cos, *sin;
    const int64_t *q_positions, *k_positions;
};

struct AttentionForward {
    AttentionProblem problem;
    Heads q, k, v, out;
    float* lse;  // [N, T], natural logarithm of each query's sum of exp(scaled scores)
};

// dq, dk, dv are gradients of the unrotated q, k, v. Every element of them is written.
struct AttentionBackward {
    AttentionProblem problem;
    Heads q, k, v, out, grad_out, dq, dk, dv;
    const float* lse;
};

}  // namespace meditron
