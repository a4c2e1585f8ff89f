// What the operators have in common: refusals and tensors through LibTorch's stable ABI.

#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace meditron {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());  // arrives in Python as ValueError
}

inline std::string shape(const Tensor& x) {
    std::string text = "[";
    for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
    return text + "]";
}

inline DType dtype_of(const Tensor& x, const char* taker) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::float32;
        case ScalarType::BFloat16: return DType::bfloat16;
        case ScalarType::Half: return DType::float16;
        default: refuse(taker, " takes float32, bfloat16 or float16");
    }
}

// Fresh large tensors come in pages of 4 KiB that the kernel clears one fault at a time, which takes as long as the
// attention of short documents. With transparent huge pages on request (the usual setting) one fault brings 2 MiB.
inline void ask_for_huge_pages(const Tensor& x) {
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page;
    const uintptr_t last = (begin + static_cast<uintptr_t>(x.numel()) * x.element_size()) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: may fail
}

inline const char* c_string(const std::optional<std::string>& text) { return text ? text->c_str() : nullptr; }

}  // namespace meditron
