// See csrc/cpu/simd.h. setup.py compiles this file for its instruction set.

#define MEDITRON_ISA portable
#define MEDITRON_VECTOR_BYTES 16
#include "kernels.h"

namespace meditron {
extern const FusedKernels portable_fused_kernels;
const FusedKernels portable_fused_kernels = portable::make_fused_kernels("portable");
}  // namespace meditron
