// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512
// (setup.py reads the line above.)

#define MEDITRON_ISA avx512
#define MEDITRON_VECTOR_BYTES 64
#include "kernels.h"

namespace meditron {
extern const FusedKernels avx512_fused_kernels;
const FusedKernels avx512_fused_kernels = avx512::make_fused_kernels("avx512");
}  // namespace meditron
