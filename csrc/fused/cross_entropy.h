// Cross-entropy in one pass over the logits each way; the softmax is never stored.

#pragma once

#include "fused.h"
#include "vectors.h"

namespace meditron::MEDITRON_ISA {

constexpr int64_t chunk_size = 2048;  // elements that stay in the first-level cache between the two looks at them

template <class Type>
struct CrossEntropyRows {
    using Element = typename Type::Element;

    static void run(const CrossEntropy& f, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const auto* x = static_cast<const Element*>(f.logits) + row * f.width;
            float largest = -__FLT_MAX__, sum = 0;
            for (int64_t start = 0; start < f.num_real; start += chunk_size) {
                const int64_t size = f.num_real - start < chunk_size ? f.num_real - start : chunk_size;
                add_chunk(x + start, size, largest, sum);
            }
            const int64_t column = f.columns[row];
            f.largest[row] = largest;
            f.sum[row] = sum;
            f.label[row] = column >= 0 && column < f.num_real ? load_some<Type>(x + column, 1)[0] : 0.0f;
        }
    }

    static MEDITRON_INLINE void add_chunk(const Element* x, int64_t size, float& largest, float& sum) {
        constexpr float minus_infinity = -__builtin_inff();
        Vec highest = broadcast(largest);
        for_each_vector(size, MEDITRON_EACH { highest = larger(load_some<Type>(x + i, n, minus_infinity), highest); });
        const float before = largest;
        largest = largest_lane(highest);
        Vec sums{};
        for_each_vector(
            size, MEDITRON_EACH { sums += exp2_of((load_some<Type>(x + i, n, minus_infinity) - largest) * log2e); });
        sum = sum * exp2_of(broadcast((before - largest) * log2e))[0] + sum_of_lanes(sums);
    }
};

template <class Type>
struct CrossEntropyBackwardRows {
    using Element = typename Type::Element;

    static void run(const CrossEntropyBackward& f, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            auto* x = static_cast<Element*>(f.logits) + row * f.width;
            const float largest = f.largest[row], scale = f.scale[row];
            const int64_t column = f.columns[row];
            const bool is_here = column >= 0 && column < f.num_real;
            const Vec label = is_here ? load_some<Type>(x + column, 1) : Vec{};
            for_each_vector(
                f.num_real, MEDITRON_EACH {
                    store_some<Type>(x + i, n, exp2_of((load_some<Type>(x + i, n) - largest) * log2e) * scale);
                });
            // From the logit again, so that probability - 1 is rounded once.
            if (is_here) store_some<Type>(x + column, 1, exp2_of((label - largest) * log2e) * scale - f.grad[row]);
            for (int64_t i = f.num_real; i < f.width; ++i) x[i] = 0;
        }
    }
};

}  // namespace meditron::MEDITRON_ISA
