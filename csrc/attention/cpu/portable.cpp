// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA portable
#define MEDITRON_VECTOR_BYTES 16
#include "tiles.h"

namespace meditron {
extern const CpuKernels portable_kernels;
const CpuKernels portable_kernels = portable::make_kernels("portable");
}  // namespace meditron
