// The instructions that CUDA C++ has no words for, one small function each. A kernel written with these alone is plain
// C++ besides: without nvcc, tests/native/emu/ptx.h takes their place and the kernel runs on a CPU.
//
// mma fragments, for lane = 4 * g + t of a warp (PTX ISA, "matrix fragments for mma.m16n8k16"):
//   A [16, 16]: a[0] row g, columns 2t, 2t+1; a[1] row g + 8; a[2], a[3] the same 8 columns further
//   B [16, 8]:  b0 rows 2t, 2t+1, column g; b1 8 rows further
//   C [16, 8]:  c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g + 8

#pragma once

#include <cstdint>

namespace meditron {

// The low dtypes, by their bits: no arithmetic is done in them.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct Float2 {
    float x, y;
};
struct alignas(16) Vec16 {
    uint32_t words[4];
};

}  // namespace meditron

#ifndef __CUDACC__
#include "emu/ptx.h"  // tests/native/emu
#else

namespace meditron {

// Dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// All threads of the block.
__device__ inline void block_sync() { __syncthreads(); }

// The lanes of a warp; what they wrote before is seen after.
__device__ inline void warp_sync() { __syncwarp(); }

// 16 bytes from global to shared memory; zeros where not valid (then nothing is read).
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for one fp32.
__device__ inline void cp_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `allowed` of the calling thread's groups are under way.
template <int allowed>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(allowed) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// row g, columns 2t, 2t+1.
__device__ inline void ldmatrix(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 2 ** x; 0 for -infinity.
__device__ inline float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Two values rounded to T, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <class T>
__device__ inline Float2 unpack(uint32_t packed);

template <>
__device__ inline Float2 unpack<BFloat16>(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <>
__device__ inline Float2 unpack<Float16>(uint32_t packed) {
    Float2 result;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(result.x), "=f"(result.y)
        : "r"(packed));
    return result;
}

}  // namespace meditron

#endif
