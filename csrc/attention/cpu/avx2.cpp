// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA avx2
#define MEDITRON_VECTOR_BYTES 32
#include "tiles.h"

namespace meditron {
extern const CpuKernels avx2_kernels;
const CpuKernels avx2_kernels = avx2::make_kernels("avx2");
}  // namespace meditron
