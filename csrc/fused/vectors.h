// Rows of any width in any dtype, vector by vector.

#pragma once

#include "../cpu/simd.h"

namespace meditron::MEDITRON_ISA {

constexpr float log2e = 1.44269504f;

// `count` (at most VL) elements; the lanes after them are `beyond`.
template <class Type>
MEDITRON_INLINE Vec load_some(const typename Type::Element* from, int64_t count, float beyond = 0.0f) {
    if (count == VL) return Type::load(from);
    typename Type::Element padded[VL] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return lane_numbers() < static_cast<int32_t>(count) ? Type::load(padded) : broadcast(beyond);
}

template <class Type>
MEDITRON_INLINE void store_some(typename Type::Element* to, int64_t count, Vec x) {
    if (count == VL) return Type::store(to, x);
    typename Type::Element padded[VL];
    Type::store(padded, x);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// body(offset, count) for every vector of a row; only the last may have count < VL.
template <class Body>
MEDITRON_INLINE void for_each_vector(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + VL <= width; i += VL) body(i, VL);
    if (i < width) body(i, width - i);
}
#define MEDITRON_EACH [&](int64_t i, int64_t n) __attribute__((always_inline))

// pass<Type>(arguments, begin, end) for the dtype of the arguments.
template <template <class> class Pass, class Arguments>
void run_rows(const Arguments& arguments, int64_t begin, int64_t end) {
    switch (arguments.dtype) {
        case DType::float32: return Pass<Float32>::run(arguments, begin, end);
        case DType::bfloat16: return Pass<BFloat16>::run(arguments, begin, end);
        case DType::float16: return Pass<Float16>::run(arguments, begin, end);
    }
}

}  // namespace meditron::MEDITRON_ISA
