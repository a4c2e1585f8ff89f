// The table of kernels of one instruction set.

#pragma once

#include "cross_entropy.h"
#include "rms_norm.h"
#include "swiglu.h"

namespace meditron::MEDITRON_ISA {

constexpr FusedKernels make_fused_kernels(const char* name) {
    return {name,
            run_rows<RmsNormRows, RmsNorm>,
            run_rows<RmsNormBackwardBlocks, RmsNormBackward>,
            run_rows<RmsNormWeight, RmsNormBackward>,
            run_rows<SwigluRows, Swiglu>,
            run_rows<SwigluBackwardRows, SwigluBackward>,
            run_rows<CrossEntropyRows, CrossEntropy>,
            run_rows<CrossEntropyBackwardRows, CrossEntropyBackward>};
}

}  // namespace meditron::MEDITRON_ISA
