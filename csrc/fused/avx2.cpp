// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi -mavx2 -mfma
// (setup.py reads the line above.)

#define MEDITRON_ISA avx2
#define MEDITRON_VECTOR_BYTES 32
#include "kernels.h"

namespace meditron {
extern const FusedKernels avx2_fused_kernels;
const FusedKernels avx2_fused_kernels = avx2::make_fused_kernels("avx2");
}  // namespace meditron
