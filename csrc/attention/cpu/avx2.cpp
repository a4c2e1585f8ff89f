// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi -mavx2 -mfma
// (setup.py reads the line above.) The code is in forward_backward.h.

#define MEDITRON_ISA avx2
#define MEDITRON_VECTOR_BYTES 32
#include "forward_backward.h"

namespace meditron {
extern const CpuKernels avx2_kernels;
const CpuKernels avx2_kernels = avx2::make_kernels("avx2");
}  // namespace meditron
