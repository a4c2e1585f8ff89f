// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA avx512
#define MEDITRON_VECTOR_BYTES 64
#include "kernels.h"

namespace meditron {
extern const FusedKernels avx512_fused_kernels;
const FusedKernels avx512_fused_kernels = avx512::make_fused_kernels("avx512");
}  // namespace meditron
