// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi
// (setup.py reads the line above.)

#define MEDITRON_ISA portable
#define MEDITRON_VECTOR_BYTES 16
#include "kernels.h"

namespace meditron {
extern const FusedKernels portable_fused_kernels;
const FusedKernels portable_fused_kernels = portable::make_fused_kernels("portable");
}  // namespace meditron
