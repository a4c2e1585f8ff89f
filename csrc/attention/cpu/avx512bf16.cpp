// compile with: -O3 -fno-math-errno -ffp-contract=fast -Wno-psabi -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mprefer-vector-width=512
// (setup.py reads the line above.) The code is in forward_backward.h.

#define MEDITRON_ISA avx512bf16
#define MEDITRON_VECTOR_BYTES 64
#define MEDITRON_BF16_PRODUCTS
#include "forward_backward.h"

namespace meditron {
extern const CpuKernels avx512bf16_kernels;
const CpuKernels avx512bf16_kernels = avx512bf16::make_kernels("avx512bf16");
}  // namespace meditron
