// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi
// (setup.py reads the line above.) The code is in forward_backward.h.

#define MEDITRON_ISA portable
#define MEDITRON_VECTOR_BYTES 16
#include "forward_backward.h"

namespace meditron {
extern const CpuKernels portable_kernels;
const CpuKernels portable_kernels = portable::make_kernels("portable");
}  // namespace meditron
