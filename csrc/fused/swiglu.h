// SwiGLU (Shazeer 2020) on the joined output of the gate and up projections.

#pragma once

#include "fused.h"
#include "vectors.h"

namespace meditron::MEDITRON_ISA {

// Below -87 silu and its slope are 0 but for rounding; there exp(-gate) would overflow. NaN stays NaN.
template <class Type>
MEDITRON_INLINE Vec load_gate(const typename Type::Element* from, int64_t count) {
    const Vec gate = load_some<Type>(from, count), lowest = broadcast(-87.0f);
    return gate < lowest ? lowest : gate;
}

MEDITRON_INLINE Vec sigmoid(Vec gate) { return 1.0f / (1.0f + exp2_of(gate * -log2e)); }

template <class Type>
struct SwigluRows {
    using Element = typename Type::Element;

    static void run(const Swiglu& f, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const auto* gate = static_cast<const Element*>(f.x) + row * 2 * f.width;
            const auto* up = gate + f.width;
            auto* y = static_cast<Element*>(f.y) + row * f.width;
            for_each_vector(
                f.width, MEDITRON_EACH {
                    const Vec g = load_gate<Type>(gate + i, n);
                    store_some<Type>(y + i, n, g * sigmoid(g) * load_some<Type>(up + i, n));
                });
        }
    }
};

template <class Type>
struct SwigluBackwardRows {
    using Element = typename Type::Element;

    static void run(const SwigluBackward& f, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const auto* gate = static_cast<const Element*>(f.x) + row * 2 * f.width;
            const auto* up = gate + f.width;
            const auto* grad = static_cast<const Element*>(f.grad) + row * f.width;
            auto* dgate = static_cast<Element*>(f.dx) + row * 2 * f.width;
            auto* dup = dgate + f.width;
            for_each_vector(
                f.width, MEDITRON_EACH {
                    const Vec g = load_gate<Type>(gate + i, n), dy = load_some<Type>(grad + i, n);
                    const Vec s = sigmoid(g), silu = g * s;
                    store_some<Type>(dup + i, n, dy * silu);
                    store_some<Type>(dgate + i, n, dy * load_some<Type>(up + i, n) * (s + silu * (1.0f - s)));
                });
        }
    }
};

}  // namespace meditron::MEDITRON_ISA
