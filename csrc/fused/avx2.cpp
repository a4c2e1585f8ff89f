// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA avx2
#define MEDITRON_VECTOR_BYTES 32
#include "kernels.h"

namespace meditron {
extern const FusedKernels avx2_fused_kernels;
const FusedKernels avx2_fused_kernels = avx2::make_fused_kernels("avx2");
}  // namespace meditron
