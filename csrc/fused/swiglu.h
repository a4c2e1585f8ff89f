// SwiGLU (Shazeer 2020) on the joined output of the gate and up projections.

#pragma once

#include "fused.h"
#include "vectors.h"

namespace meditron::MEDITRON_ISA {

MEDITRON_INLINE Vec sigmoid(Vec x) {
    const Vec most = broadcast(126.0f);
    Vec power = x * -log2e;
    power = power > most ? most : power;
    return 1.0f / (1.0f + exp2_of(power));
}

template <class Type>
struct SwigluRows {
    using Element = typename Type::Element;

    static void run(const Swiglu& f, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const auto* gate = static_cast<const Element*>(f.x) + row * 2 * f.width;
            const auto* up = gate + f.width;
            auto* y = static_cast<Element*>(f.y) + row * f.width;
            for_each_vector(f.width, MEDITRON_EACH {
                const Vec g = load_some<Type>(gate + i, n);
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
            for_each_vector(f.width, MEDITRON_EACH {
                const Vec g = load_some<Type>(gate + i, n), dy = load_some<Type>(grad + i, n);
                const Vec s = sigmoid(g), silu = g * s;
                store_some<Type>(dup + i, n, dy * silu);
                store_some<Type>(dgate + i, n, dy * load_some<Type>(up + i, n) * (s + silu * (1.0f - s)));
            });
        }
    }
};

}  // namespace meditron::MEDITRON_ISA
