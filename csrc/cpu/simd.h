// Vectors of VL floats in the compiler's vector extension: the same source becomes AVX-512, AVX2, SSE2 or NEON code.
//
// Included by the files avx512.cpp, avx2.cpp and portable.cpp, each compiled for its own instruction set, with
// MEDITRON_ISA as the namespace and MEDITRON_VECTOR_BYTES as the width. Nothing here may use inline functions of the
// standard library: the linker keeps one copy of such a function, and it could be one that another processor cannot
// run.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(MEDITRON_ISA) || !defined(MEDITRON_VECTOR_BYTES)
#error "include this from a file that names its instruction set"
#endif

namespace meditron::MEDITRON_ISA {

constexpr int VL = MEDITRON_VECTOR_BYTES / 4;
using Vec = float __attribute__((vector_size(MEDITRON_VECTOR_BYTES)));
using VecI = int32_t __attribute__((vector_size(MEDITRON_VECTOR_BYTES)));
using VecU = uint32_t __attribute__((vector_size(MEDITRON_VECTOR_BYTES)));
using Half = uint16_t __attribute__((vector_size(MEDITRON_VECTOR_BYTES / 2)));
using UnalignedVec = float __attribute__((vector_size(MEDITRON_VECTOR_BYTES), aligned(4), may_alias));
using UnalignedHalf = uint16_t __attribute__((vector_size(MEDITRON_VECTOR_BYTES / 2), aligned(2), may_alias));

#define MEDITRON_INLINE inline __attribute__((always_inline))

MEDITRON_INLINE Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
MEDITRON_INLINE void store(float* to, Vec x) { *reinterpret_cast<UnalignedVec*>(to) = x; }
MEDITRON_INLINE Vec broadcast(float x) { return x - Vec{}; }
MEDITRON_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

template <class To, class From>
MEDITRON_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    __builtin_memcpy(&y, &x, sizeof(To));
    return y;
}

MEDITRON_INLINE VecI lane_numbers() {
    VecI lanes;
    for (int i = 0; i < VL; ++i) lanes[i] = i;
    return lanes;
}

MEDITRON_INLINE float largest_lane(Vec x) {
    float y = x[0];
    for (int i = 1; i < VL; ++i) y = x[i] > y ? x[i] : y;
    return y;
}

MEDITRON_INLINE float sum_of_lanes(Vec x) {
    float y = 0;
    for (int i = 0; i < VL; ++i) y += x[i];
    return y;
}

// 2^x for x <= 0 (also right up to 127), relative error below 2e-7; exactly 0 below -126.5, NaN stays NaN.
MEDITRON_INLINE Vec exp2_of(Vec x) {
    const Vec lowest = broadcast(-127.0f);
    x = x < lowest ? lowest : x;
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the lowest bits
    const Vec shifted = x + magic;
    const Vec fraction = x - (shifted - magic);  // -0.5 .. 0.5
    // Minimax polynomial of 2^f on that interval, relative error 2e-9 before rounding.
    Vec y = broadcast(1.5353362e-4f);
    y = y * fraction + 1.33988745e-3f;
    y = y * fraction + 9.61843736e-3f;
    y = y * fraction + 5.55033247e-2f;
    y = y * fraction + 2.40226479e-1f;
    y = y * fraction + 6.93147203e-1f;
    y = y * fraction + 1.0f;
    const VecI exponent = (bits<VecI>(shifted) - bits<VecI>(magic) + 127) << 23;
    return y * bits<Vec>(exponent);
}

// ------------------------------------------------------------------------- bfloat16 and IEEE half precision

MEDITRON_INLINE Vec from_bfloat16(Half x) { return bits<Vec>(__builtin_convertvector(x, VecU) << 16); }

MEDITRON_INLINE Half to_bfloat16(Vec x) {  // to nearest, ties to even
    const VecU u = bits<VecU>(x);
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VecU quiet = (u >> 16) | 0x40u;
    return __builtin_convertvector(x == x ? rounded : quiet, Half);
}

MEDITRON_INLINE Vec from_float16(Half x) {
    const VecU u = __builtin_convertvector(x, VecU);
    const Vec magnitude = bits<Vec>((u & 0x7fffu) << 13) * 0x1p112f;  // moves the exponent's bias, subnormals too
    const VecU special = (u & 0x7c00u) == 0x7c00u ? VecU{} + 0x7f800000u : VecU{};
    return bits<Vec>(bits<VecU>(magnitude) | special | ((u & 0x8000u) << 16));
}

MEDITRON_INLINE Half to_float16(Vec x) {  // to nearest, ties to even
    const VecU sign = (bits<VecU>(x) >> 16) & 0x8000u;
    const VecU u = bits<VecU>(x) & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 leaves its 10 bits, rounded, at the end of the mantissa.
    const VecU subnormal = bits<VecU>(bits<Vec>(u) + 0.5f) - 0x3f000000u;
    const VecU normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
    VecU y = u < 0x38800000u ? subnormal : normal;
    y = u >= 0x477ff000u ? VecU{} + 0x7c00u : y;  // 65520 and more round to infinity
    y = u > 0x7f800000u ? VecU{} + 0x7e00u : y;
    return __builtin_convertvector(y | sign, Half);
}

// The caller's memory as vectors of fp32.
struct Float32 {
    using Element = float;
    static MEDITRON_INLINE Vec load(const float* from) { return MEDITRON_ISA::load(from); }
    static MEDITRON_INLINE void store(float* to, Vec x) { MEDITRON_ISA::store(to, x); }
};

struct BFloat16 {
    using Element = uint16_t;
    static MEDITRON_INLINE Vec load(const uint16_t* from) {
        return from_bfloat16(*reinterpret_cast<const UnalignedHalf*>(from));
    }
    static MEDITRON_INLINE void store(uint16_t* to, Vec x) { *reinterpret_cast<UnalignedHalf*>(to) = to_bfloat16(x); }
};

struct Float16 {
    using Element = uint16_t;
    static MEDITRON_INLINE Vec load(const uint16_t* from) {
        return from_float16(*reinterpret_cast<const UnalignedHalf*>(from));
    }
    static MEDITRON_INLINE void store(uint16_t* to, Vec x) { *reinterpret_cast<UnalignedHalf*>(to) = to_float16(x); }
};

// --------------------------------------------------------------------------------------- VL x VL transposition

// Lane i of exchange<distance, upper>(a, b): the halves that a butterfly of this distance gives its two outputs.
template <int distance, bool upper>
MEDITRON_INLINE Vec exchange(Vec a, Vec b) {
    VecI from;
    for (int i = 0; i < VL; ++i) {
        const bool second = (i & distance) != 0;
        from[i] = upper ? (second ? VL + i : i + distance) : (second ? VL + i - distance : i);
    }
#ifdef __clang__
    Vec y;
    for (int i = 0; i < VL; ++i) y[i] = from[i] < VL ? a[from[i]] : b[from[i] - VL];
    return y;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

template <int distance = 1>
MEDITRON_INLINE void transpose(Vec (&rows)[VL]) {
    if constexpr (distance < VL) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) {
            if ((i & distance) == 0) {
                const Vec a = rows[i], b = rows[i + distance];
                rows[i] = exchange<distance, false>(a, b);
                rows[i + distance] = exchange<distance, true>(a, b);
            }
        }
        transpose<2 * distance>(rows);
    }
}

}  // namespace meditron::MEDITRON_ISA
