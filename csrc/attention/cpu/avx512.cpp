// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512
// (setup.py reads the line above.) The code is in forward_backward.h.

#define MEDITRON_ISA avx512
#define MEDITRON_VECTOR_BYTES 64
#include "forward_backward.h"

namespace meditron {
extern const CpuKernels avx512_kernels;
const CpuKernels avx512_kernels = avx512::make_kernels("avx512");
}  // namespace meditron
