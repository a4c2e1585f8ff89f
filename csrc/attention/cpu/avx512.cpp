// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA avx512
#define MEDITRON_VECTOR_BYTES 64
#include "tiles.h"

namespace meditron {
extern const CpuKernels avx512_kernels;
const CpuKernels avx512_kernels = avx512::make_kernels("avx512");
}  // namespace meditron
