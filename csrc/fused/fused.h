// What the fused pieces of a Llama layer and of its loss are given, and their kernels as one table per instruction set.
//
// Rows are contiguous, `data` of one dtype. A kernel does the rows (or blocks, or columns) begin .. end, each alone, so
// that nothing depends on how threads share them. Statistics are fp32.

#pragma once

#include <cstdint>

#include "../dtype.h"

namespace meditron {

// y = x rstd weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row.
struct RmsNorm {
    DType dtype;
    int64_t rows, width;
    float eps;
    const void *x, *weight;  // [rows, width], [width]
    void* y;                 // [rows, width]
    float* rstd;             // [rows]
};

struct RmsNormBackward {
    DType dtype;
    int64_t rows, width;
    const void *grad, *x, *weight;
    const float* rstd;
    void *dx, *dweight;
    // dweight is summed over the rows of each block, then over the blocks: an order that depends on `rows` alone.
    int64_t block_rows, num_blocks, partial_stride;
    float* partials;  // [num_blocks, partial_stride], a stride that is a multiple of 16
};

// y = silu(gate) up with gate, up = halves of each row of x.
struct Swiglu {
    DType dtype;
    int64_t rows, width;  // of y
    const void* x;        // [rows, 2 width]
    void* y;              // [rows, width]
};

struct SwigluBackward {
    DType dtype;
    int64_t rows, width;
    const void *grad, *x;  // [rows, width], [rows, 2 width]
    void* dx;              // [rows, 2 width]
};

// Of each row's first num_real logits: the largest, the sum of exp(logit - largest), and the logit at `column`, 0 where
// that is not among them.
struct CrossEntropy {
    DType dtype;
    int64_t rows, width, num_real;
    const void* logits;      // [rows, width]
    const int64_t* columns;  // [rows]
    float *largest, *sum, *label;
};

// logits = exp(logits - largest) scale, less `grad` at `column`; 0 from num_real on.
struct CrossEntropyBackward {
    DType dtype;
    int64_t rows, width, num_real;
    void* logits;
    const int64_t* columns;
    const float *largest, *scale, *grad;
};

struct FusedKernels {
    const char* name;
    void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end);
    void (*rms_norm_backward)(const RmsNormBackward&, int64_t begin_block, int64_t end_block);
    void (*rms_norm_weight)(const RmsNormBackward&, int64_t begin_vector, int64_t end_vector);  // of 16 columns
    void (*swiglu)(const Swiglu&, int64_t begin, int64_t end);
    void (*swiglu_backward)(const SwigluBackward&, int64_t begin, int64_t end);
    void (*cross_entropy)(const CrossEntropy&, int64_t begin, int64_t end);
    void (*cross_entropy_backward)(const CrossEntropyBackward&, int64_t begin, int64_t end);
};

extern const FusedKernels portable_fused_kernels;
#if defined(__x86_64__)
extern const FusedKernels avx2_fused_kernels;
extern const FusedKernels avx512_fused_kernels;
#endif

}  // namespace meditron
