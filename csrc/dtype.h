// Element types of the tensors that kernels are given.

#pragma once

#include <cstdint>

namespace meditron {

enum class DType : int32_t { float32, bfloat16, float16 };

// Always inlined, as files compiled for one instruction set use it: see cpu/simd.h.
inline __attribute__((always_inline)) int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace meditron
