// The instructions of sm_90a: barriers in shared memory (mbarrier) and matrix products of a warpgroup (wgmma).
//
// A warpgroup is four consecutive warps. Its accumulators [64, n] are those of mma m16n8 (ptx.cuh): warp w has the
// rows 16 w .. 16 w + 15, d[j] the columns 8 j .. 8 j + 7; operands from registers likewise. Products run
// asynchronously: wgmma_fence() before the first one of a group, as its registers may have been written;
// wgmma_commit() closes a group, wgmma_wait() waits for all but the youngest ones. Operands in shared memory are read
// through the asynchronous proxy: threads that wrote them call fence_proxy_async() before they tell others.

#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__

namespace meditron {

using SharedBarrier = uint64_t;

// By one thread, before a block_sync().
__device__ inline void barrier_init(SharedBarrier* barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals)
                 : "memory");
}

// What the thread did before is done for those who wait for the phase that this arrival helps to complete.
__device__ inline void barrier_arrive(SharedBarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the phase of this parity is complete; the one before the first has parity 1 and counts as complete.
__device__ inline void barrier_wait(SharedBarrier* barrier, int parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

// The threads of a warpgroup. When a warp's products have ended, those of the others need not have.
__device__ inline void warpgroup_sync() { asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory"); }

__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers per thread of the calling warpgroup from here on. All together may not exceed those of the launch.
template <int registers>
__device__ inline void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// `ready`: accumulators of the groups that have ended; keeps the compiler from reading them earlier.
template <int allowed, int n>
__device__ __forceinline__ void wgmma_wait(float (&ready)[n][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(allowed) : "memory");
#pragma unroll
    for (int i = 0; i < 4 * n; ++i) asm volatile("" : "+f"(ready[i / 4][i % 4])::"memory");
}

// Products of 16 terms. d (+)= A B^T: A [64, 16], B [n, 16] in shared memory, rows contiguous.
template <class T, int n>
__device__ void wgmma_rows(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool accumulate);

// d += A B: A [64, 16] in registers, B [16, n] in shared memory, rows contiguous.
template <class T, int n>
__device__ void wgmma_columns(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b);

#define MEDITRON_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MEDITRON_D16(j) MEDITRON_D4(j), MEDITRON_D4(j + 1), MEDITRON_D4(j + 2), MEDITRON_D4(j + 3)
#define MEDITRON_D32(j) MEDITRON_D16(j), MEDITRON_D16(j + 4)
#define MEDITRON_D64 MEDITRON_D32(0), MEDITRON_D32(8)
#define MEDITRON_NAMES32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MEDITRON_NAMES64                                                                                          \
    MEDITRON_NAMES32                                                                                              \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MEDITRON_ROWS(T, N, TYPE, REGISTERS, NAMES, A, B, SCALE)                                                      \
    template <>                                                                                                       \
    __device__ __forceinline__ void wgmma_rows<T, N>(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" #N               \
                     "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;}"                           \
                     : REGISTERS                                                                                      \
                     : "l"(a), "l"(b), "r"(accumulate ? 1 : 0));                                                      \
    }
#define MEDITRON_COLUMNS(T, N, TYPE, REGISTERS, NAMES, A, B)                                                        \
    template <>                                                                                                     \
    __device__ __forceinline__ void wgmma_columns<T, N>(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE     \
                     "." TYPE " {" NAMES "}, {" A "}, " B ", p, 1, 1, 1;}"                                          \
                     : REGISTERS                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
    }
#define MEDITRON_WGMMA(T, TYPE)                                                                   \
    MEDITRON_ROWS(T, 64, TYPE, MEDITRON_D32(0), MEDITRON_NAMES32, "%32", "%33", "%34")            \
    MEDITRON_ROWS(T, 128, TYPE, MEDITRON_D64, MEDITRON_NAMES64, "%64", "%65", "%66")              \
    MEDITRON_COLUMNS(T, 64, TYPE, MEDITRON_D32(0), MEDITRON_NAMES32, "%32, %33, %34, %35", "%36") \
    MEDITRON_COLUMNS(T, 128, TYPE, MEDITRON_D64, MEDITRON_NAMES64, "%64, %65, %66, %67", "%68")
MEDITRON_WGMMA(BFloat16, "bf16")
MEDITRON_WGMMA(Float16, "f16")
#undef MEDITRON_WGMMA
#undef MEDITRON_COLUMNS
#undef MEDITRON_ROWS
#undef MEDITRON_NAMES64
#undef MEDITRON_NAMES32
#undef MEDITRON_D64
#undef MEDITRON_D32
#undef MEDITRON_D16
#undef MEDITRON_D4

}  // namespace meditron

#else
#include "emu/sm90_ptx.h"  // tests/native/emu
#endif

namespace meditron {

// A tile in shared memory as wgmma reads it with swizzling by 128 bytes: panels of 64 columns, in which a row is 128
// bytes, 8 chunks permuted by the row's number. Tiles start at multiples of 1024 bytes.
template <int D, int rows>
struct Panels {
    static constexpr int chunks = D / 8, panel_bytes = rows * 128, bytes = D / 64 * panel_bytes;
    static_assert(D % 64 == 0 && rows % 8 == 0);

    __device__ static unsigned char* address(unsigned char* tile, int row, int chunk) {
        return tile + chunk / 8 * panel_bytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
    }

    // Matrix descriptor (PTX ISA, "matrix descriptor format") of what starts at row `row`, a multiple of 8, and column
    // `column`, a multiple of 16: groups of 8 rows follow at 1024 bytes, panels (where it has several) at panel_bytes.
    __device__ static uint64_t descriptor(const unsigned char* tile, int row, int column) {
        const uint32_t start = shared_address(tile) + column / 64 * panel_bytes + row * 128 + column % 64 * 2;
        constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
        return start >> 4 | uint64_t{panel_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 | swizzle_128;
    }
};

}  // namespace meditron
