// What csrc/cuda/ptx.cuh offers, for the emulator; included by it where the compiler is not nvcc.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emu::self().index)
#define blockIdx (emu::block().index)
#define blockDim (emu::block().dimensions)
#define gridDim (emu::block().grid)

namespace meditron {

inline unsigned char* shared_memory() { return emu::block().shared; }

inline void block_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!emu::removed("block_sync", file, line)) emu::barrier_sync(0, emu::block().dimensions.x);
}

inline void warp_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    char nothing = 0;
    if (!emu::removed("warp_sync", file, line)) emu::meet_warp("warp_sync", nothing, [](char**) {});
}

inline void cp_async(void* shared, const void* global, bool valid, size_t bytes) {
    emu::check_shared(shared, bytes);
    if (valid) emu::check_global(global, bytes);
    // What was there is lost from now on; who reads it before the wait gets NaN.
    if (emu::machine.settings.deferred_copies) memset(shared, 0xff, bytes);
    emu::start_copy([=] { valid ? memcpy(shared, global, bytes) : memset(shared, 0, bytes); });
}

inline void cp_async_16(void* shared, const void* global, bool valid) { cp_async(shared, global, valid, 16); }
inline void cp_async_4(void* shared, const void* global, bool valid) { cp_async(shared, global, valid, 4); }
inline void cp_async_commit() { emu::commit_copies(); }

template <int allowed>
void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!emu::removed("cp_async_wait", file, line)) emu::wait_for_copies(allowed);
}

struct LdmatrixArguments {
    uint32_t* to;
    const void* row;
};

template <bool transposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
    emu::check_shared(row, 16);
    LdmatrixArguments mine{to, row};
    emu::meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [](LdmatrixArguments** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t values[8][8];
            unsigned uses_of_banks[8] = {}, passes = 0;
            for (int i = 0; i < 8; ++i) {
                const void* address = lanes[8 * matrix + i]->row;
                memcpy(values[i], address, 16);
                unsigned& uses = uses_of_banks[reinterpret_cast<uintptr_t>(address) / 16 % 8];
                passes = std::max(passes, ++uses);
            }
            emu::machine.bank_conflicts += passes - 1;
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = 2 * (lane % 4);
                const uint32_t low = transposed ? values[t][g] : values[g][t];
                const uint32_t high = transposed ? values[t + 1][g] : values[g][t + 1];
                lanes[lane]->to[matrix] = low | high << 16;
            }
        }
    });
}

inline void ldmatrix(uint32_t (&to)[4], const void* row) { load_matrices<false>(to, row); }
inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) { load_matrices<true>(to, row); }

inline float to_float(BFloat16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline float to_float(Float16 value) {
    _Float16 half;
    memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
}

template <class T>
T round_to(float value);

template <>
inline BFloat16 round_to<BFloat16>(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 round_to<Float16>(float value) {
    const auto half = static_cast<_Float16>(value);
    Float16 result;
    memcpy(&result.bits, &half, 2);
    return result;
}

template <class T>
uint32_t pack(float low, float high) {
    return round_to<T>(low).bits | uint32_t{round_to<T>(high).bits} << 16;
}

template <class T>
Float2 unpack(uint32_t packed) {
    return {to_float(T{static_cast<uint16_t>(packed)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

struct MmaArguments {
    float* c;
    const uint32_t* a;
    uint32_t b0, b1;
};

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaArguments mine{c, a, b0, b1};
    emu::meet_warp("mma", mine, [](MmaArguments** lanes) {
        float A[16][16], B[16][8], C[16][8];
        const auto put = [](float* low, float* high, uint32_t packed) {
            const Float2 pair = unpack<T>(packed);
            *low = pair.x;
            *high = pair.y;
        };
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const MmaArguments& its = *lanes[lane];
            for (int part = 0; part < 4; ++part) {
                const int row = g + part % 2 * 8, column = t + part / 2 * 8;
                put(&A[row][column], &A[row][column + 1], its.a[part]);
            }
            put(&B[t][g], &B[t + 1][g], its.b0);
            put(&B[t + 8][g], &B[t + 9][g], its.b1);
            for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][t + i % 2] = its.c[i];
        }
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = C[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    });
}

struct ShuffleArguments {
    float given, taken;
    int mask;
};

inline float shuffle_xor(float value, int mask) {
    ShuffleArguments mine{value, 0, mask};
    emu::meet_warp("shfl.bfly", mine, [](ShuffleArguments** lanes) {
        for (int lane = 0; lane < 32; ++lane) lanes[lane]->taken = lanes[lane ^ lanes[lane]->mask]->given;
    });
    return mine.taken;
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace meditron
