// The CPU kernels as one table per instruction set; cpu.cpp picks the best one that this processor runs.

#pragma once

#include <cstdint>

#include "../attention.h"

namespace meditron {

// What one thread does at a time: queries begin .. end (counted in the document) of all query heads of one key/value
// head. A backward unit takes all queries of its document, so that its sums have one order whatever the number of
// threads.
struct AttentionUnit {
    int64_t document, kv_head, begin, end;
};

struct CpuKernels {
    const char* name;
    // Floats of scratch memory (64-byte aligned) for documents of at most this many queries and keys.
    int64_t (*forward_scratch)(const AttentionProblem&, int64_t max_queries, int64_t max_keys);
    int64_t (*backward_scratch)(const AttentionProblem&, int64_t max_queries, int64_t max_keys);
    void (*forward)(const AttentionForward&, const AttentionUnit&, float* scratch);
    void (*backward)(const AttentionBackward&, const AttentionUnit&, float* scratch);
};

extern const CpuKernels portable_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
extern const CpuKernels avx512bf16_kernels;  // bfloat16 products in pairs, everything else as avx512
#endif

}  // namespace meditron
