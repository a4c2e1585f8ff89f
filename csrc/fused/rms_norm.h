// RMSNorm (Zhang & Sennrich 2019) and its gradients.

#pragma once

#include "fused.h"
#include "vectors.h"

namespace meditron::MEDITRON_ISA {

template <class Type>
struct RmsNormRows {
    using Element = typename Type::Element;

    static void run(const RmsNorm& f, int64_t begin, int64_t end) {
        const auto* weight = static_cast<const Element*>(f.weight);
        for (int64_t row = begin; row < end; ++row) {
            const auto* x = static_cast<const Element*>(f.x) + row * f.width;
            auto* y = static_cast<Element*>(f.y) + row * f.width;
            Vec squares{};
            for_each_vector(
                f.width, MEDITRON_EACH {
                    const Vec a = load_some<Type>(x + i, n);
                    squares += a * a;
                });
            const float rstd = 1.0f / __builtin_sqrtf(sum_of_lanes(squares) / static_cast<float>(f.width) + f.eps);
            f.rstd[row] = rstd;
            for_each_vector(
                f.width, MEDITRON_EACH {
                    store_some<Type>(y + i, n, load_some<Type>(x + i, n) * rstd * load_some<Type>(weight + i, n));
                });
        }
    }
};

// dx = rstd (g w - x rstd^2 mean(g w x)), and each block's part of dweight = sum of g x rstd.
template <class Type>
struct RmsNormBackwardBlocks {
    using Element = typename Type::Element;

    static void run(const RmsNormBackward& f, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            float* partial = f.partials + block * f.partial_stride;
            for (int64_t i = 0; i < f.partial_stride; i += VL) store(partial + i, Vec{});
            const int64_t first = block * f.block_rows;
            const int64_t last = first + f.block_rows < f.rows ? first + f.block_rows : f.rows;
            for (int64_t row = first; row < last; ++row) one_row(f, row, partial);
        }
    }

    static MEDITRON_INLINE void one_row(const RmsNormBackward& f, int64_t row, float* partial) {
        const auto* weight = static_cast<const Element*>(f.weight);
        const auto* g = static_cast<const Element*>(f.grad) + row * f.width;
        const auto* x = static_cast<const Element*>(f.x) + row * f.width;
        auto* dx = static_cast<Element*>(f.dx) + row * f.width;
        Vec products{};
        for_each_vector(
            f.width, MEDITRON_EACH {
                products += load_some<Type>(g + i, n) * load_some<Type>(weight + i, n) * load_some<Type>(x + i, n);
            });
        const float rstd = f.rstd[row];
        const float pull = sum_of_lanes(products) / static_cast<float>(f.width) * rstd * rstd * rstd;
        for_each_vector(
            f.width, MEDITRON_EACH {
                const Vec a = load_some<Type>(x + i, n), b = load_some<Type>(g + i, n) * rstd;
                store_some<Type>(dx + i, n, b * load_some<Type>(weight + i, n) - a * pull);
                store(partial + i, load(partial + i) + b * a);
            });
    }
};

template <class Type>
struct RmsNormWeight {
    static void run(const RmsNormBackward& f, int64_t begin, int64_t end) {
        auto* dweight = static_cast<typename Type::Element*>(f.dweight);
        const int64_t last = end * 16 < f.width ? end * 16 : f.width;
        for_each_vector(
            last - begin * 16, MEDITRON_EACH {
                const int64_t column = begin * 16 + i;
                Vec sum{};
                for (int64_t block = 0; block < f.num_blocks; ++block)
                    sum += load(f.partials + block * f.partial_stride + column);
                store_some<Type>(dweight + column, n, sum);
            });
    }
};

}  // namespace meditron::MEDITRON_ISA
