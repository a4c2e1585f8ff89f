// See simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA avx512bf16
#define MEDITRON_VECTOR_BYTES 64
#define MEDITRON_BF16_PRODUCTS
#include "tiles.h"

namespace meditron {
extern const CpuKernels avx512bf16_kernels;
const CpuKernels avx512bf16_kernels = avx512bf16::make_kernels("avx512bf16");
}  // namespace meditron
