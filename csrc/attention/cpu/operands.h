// Rows as the products want them: plain fp32, or pairs of bfloat16 (gemm.h).
//
// "Rows" hold a row's channels one after the other: D fp32 numbers, or D/2 pairs (c, c+1). "Paired rows" are for a k
// that counts rows: with pairs, row i holds rows 2i and 2i+1, channel by channel; with fp32 they are the rows
// themselves.

#pragma once

#include "gemm.h"
#include "rows.h"

namespace meditron::MEDITRON_ISA {

template <class Math, class Type>
struct Operands {
    static_assert(Math::per_element == 1);

    static void read(const HeadRows& from, int64_t begin, int64_t count, int64_t head_dim, float* rows) {
        read_rows<Type>(from, begin, count, head_dim, rows);
    }
    static const float* pair_rows(const float* rows, int64_t, int64_t, float*) { return rows; }
    // fp32 rows [count, size] of stride ld: weights of keys, which are computed in place.
    static void pack(float*, int64_t) {}
    static const float* pack_to(const float* row, int64_t, float*) { return row; }
    static void pair(float*, int64_t, int64_t, int64_t) {}
};

#ifdef MEDITRON_BF16_PRODUCTS
MEDITRON_INLINE void store_pairs(float* to, Vec low, Vec high) {  // 2 VL numbers of one row as VL pairs
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    __builtin_memcpy(to, &both, sizeof(both));
}

MEDITRON_INLINE Vec pairs_of(VecU even, VecU odd) { return bits<Vec>((even & 0xffffu) | (odd << 16)); }

MEDITRON_INLINE VecU bfloat16_bits(Vec x) { return __builtin_convertvector(bits<Half>(_mm512_cvtneps_pbh(x)), VecU); }

template <>
struct Operands<Bf16Math, BFloat16> {
    static void read(const HeadRows& from, int64_t begin, int64_t count, int64_t head_dim, float* rows) {
        if (from.cos) {
            float row[max_head_dim];
            for (int64_t r = 0; r < count; ++r) {
                read_rows<BFloat16>(from, begin + r, 1, head_dim, row);
                pack_to(row, head_dim, rows + r * head_dim / 2);
            }
            return;
        }
        const auto* data = static_cast<const uint16_t*>(from.data);
        for (int64_t r = 0; r < count; ++r) {
            const uint16_t* row = data + (begin + r) * from.stride;
            if (r + rows_ahead < count) prefetch_row(row + rows_ahead * from.stride, 2 * head_dim);
            __builtin_memcpy(rows + r * head_dim / 2, row, static_cast<size_t>(2 * head_dim));
        }
    }

    // Rows [count, head_dim] of pairs -> paired rows [ceil(count / 2), head_dim]; a missing last row counts as 0.
    static const float* pair_rows(const float* rows, int64_t count, int64_t head_dim, float* paired) {
        const auto* data = reinterpret_cast<const uint16_t*>(rows);
        for (int64_t r = 0; r < count; r += 2) {
            for (int64_t c = 0; c < head_dim; c += VL) {
                const Half even = *reinterpret_cast<const UnalignedHalf*>(data + r * head_dim + c);
                const Half odd =
                    r + 1 < count ? *reinterpret_cast<const UnalignedHalf*>(data + (r + 1) * head_dim + c) : Half{};
                store(paired + r / 2 * head_dim + c,
                      pairs_of(__builtin_convertvector(even, VecU), __builtin_convertvector(odd, VecU)));
            }
        }
        return paired;
    }

    static void pack(float* row, int64_t size) { pack_to(row, size, row); }  // the writing never overtakes the reading

    static const float* pack_to(const float* row, int64_t size, float* to) {
        int64_t c = 0;
        for (; c + 2 * VL <= size; c += 2 * VL) store_pairs(to + c / 2, load(row + c), load(row + c + VL));
        if (c < size) {
            const Half last = bits<Half>(_mm512_cvtneps_pbh(load(row + c)));
            *reinterpret_cast<UnalignedHalf*>(reinterpret_cast<uint16_t*>(to) + c) = last;
        }
        return to;
    }

    // fp32 rows [count, size] of stride ld -> paired rows in place; a missing last row counts as 0.
    static void pair(float* rows, int64_t count, int64_t size, int64_t ld) {
        for (int64_t r = 0; r < count; r += 2) {
            const float* even = rows + r * ld;
            for (int64_t c = 0; c < size; c += VL) {
                const Vec odd = r + 1 < count ? load(even + ld + c) : Vec{};
                store(rows + r / 2 * ld + c, pairs_of(bfloat16_bits(load(even + c)), bfloat16_bits(odd)));
            }
        }
    }
};
#endif

}  // namespace meditron::MEDITRON_ISA
