// What csrc/cuda/sm90_ptx.cuh offers, for the emulator; included by it where the compiler is not nvcc.
//
// Products of a warpgroup run when they are issued, or (deferred) when a wait demands it, on the registers as they are
// then. Shared memory has a second view, that of the asynchronous proxy: a fence carries over what was written.

#pragma once

#include <utility>

#include "ptx.h"

namespace meditron {

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emu::block().shared);
}

struct alignas(8) SharedBarrier {
    uint16_t num_arrivals, open;
    uint32_t phase;
};

inline void barrier_init(SharedBarrier* barrier, int num_arrivals) {
    emu::check_shared(barrier, 8);
    *barrier = {static_cast<uint16_t>(num_arrivals), static_cast<uint16_t>(num_arrivals), 0};
}

inline void barrier_arrive(SharedBarrier* barrier) {
    // Who copies hardly ever waits; so that others get ahead of it, some arrivals come late.
    if (emu::random_bits() % 4 == 0) emu::wait_until([late = false]() mutable { return std::exchange(late, true); });
    if (--barrier->open > 0) return;
    barrier->open = barrier->num_arrivals;
    ++barrier->phase;
}

inline void barrier_wait(SharedBarrier* barrier, int parity, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
    if (emu::removed("barrier_wait", file, line)) return;
    emu::wait_until([=] { return static_cast<int>(barrier->phase % 2) != parity; });
}

// Products end for all of a warpgroup at once here, so nothing would show that this one is missing: it is no site.
inline void warpgroup_sync() { emu::barrier_sync(emu::self().warp / 4 + 1, 128); }

// A copy for every lane would take all the time there is: the last lane of the warp carries over what all wrote.
inline void fence_proxy_async(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emu::removed("fence_proxy_async", file, line)) return;
    emu::Warp& warp = emu::block().warps[emu::self().warp];
    if (++warp.proxy_fences % 32 == 0)
        memcpy(emu::block().async_view.data(), emu::block().shared, emu::block().shared_bytes);
}

template <int registers>
void give_registers_back() {}
template <int registers>
void take_registers() {}

inline emu::Products& products() { return emu::block().products[emu::self().warp / 4]; }

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emu::removed("wgmma_fence", file, line)) return;
    char nothing = 0;
    emu::meet_warpgroup("wgmma.fence", nothing, [](char**) { products().fenced = true; });
}

inline void wgmma_commit() {
    char nothing = 0;
    emu::meet_warpgroup("wgmma.commit_group", nothing, [](char**) {
        products().groups.push_back(std::move(products().open));
        products().open.clear();
        products().fenced = false;  // a group may use registers that were written since the one before began
    });
}

template <int allowed, int n>
void wgmma_wait(float (&)[n][4], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emu::removed("wgmma_wait", file, line)) return;
    char nothing = 0;
    emu::meet_warpgroup("wgmma.wait_group", nothing, [](char**) {
        auto& groups = products().groups;
        while (groups.size() > allowed) {
            for (const auto& product : groups.front()) product();
            groups.erase(groups.begin());
        }
    });
}

// Where a matrix descriptor says that its values are.
template <class T>
class SharedMatrix {
public:
    explicit SharedMatrix(uint64_t descriptor)
        : start_((descriptor & 0x3fff) << 4),
          leading_((descriptor >> 16 & 0x3fff) << 4),
          stride_((descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) emu::fail("matrix descriptor: only swizzling by 128 bytes is emulated");
        if (start_ % 1024 >= 128) emu::fail("matrix descriptor: starts inside of a group of 8 rows");
    }

    // Value k of 16 of row i, where the k are contiguous; and of column i, where the columns are.
    float by_rows(int i, int k) const { return at(i / 8 * stride_ + i % 8 * 128 + k * 2); }
    float by_columns(int i, int k) const { return at(i / 64 * leading_ + i % 64 * 2 + k / 8 * stride_ + k % 8 * 128); }

private:
    float at(uint32_t offset) const {
        uint32_t address = start_ + offset;
        address ^= address >> 7 << 4 & 0x70;
        if (address + 2 > emu::block().shared_bytes) emu::fail("wgmma reads at %u of shared memory", address);
        T value;
        memcpy(&value, emu::block().async_view.data() + address, 2);
        return to_float(value);
    }

    uint32_t start_, leading_, stride_;
};

// d[64][n] = (d or 0) + A B, for values a(row, k) and b(k, column).
template <int n, class A, class B>
void multiply_group(const std::array<float*, 128>& d, bool accumulate, A a, B b) {
    static float left[64][16], right[16][n], sums[64][n];
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k) left[row][k] = a(row, k);
    for (int k = 0; k < 16; ++k)
        for (int column = 0; column < n; ++column) right[k][column] = b(k, column);
    const auto for_each_register = [&](auto visit) {
        for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < n / 2; ++i)
                visit(d[thread][i],
                      sums[thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2]);
    };
    for_each_register([&](float& mine, float& sum) { sum = accumulate ? mine : 0; });
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < n; ++column) sums[row][column] += left[row][k] * right[k][column];
    for_each_register([&](float& mine, float& sum) { mine = sum; });
}

inline void start_product(std::function<void()> product) {
    if (!products().fenced) emu::fail("a group of wgmma without wgmma_fence before it");
    if (emu::machine.settings.deferred_copies)
        products().open.push_back(std::move(product));
    else
        product();
}

struct WgmmaArguments {
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b;
    bool accumulate;
};

inline std::array<float*, 128> accumulators_of(WgmmaArguments** threads) {
    std::array<float*, 128> d;
    for (int i = 0; i < 128; ++i) d[i] = threads[i]->d;
    return d;
}

template <class T, int n>
void wgmma_rows(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool accumulate) {
    WgmmaArguments mine{d[0], nullptr, a, b, accumulate};
    emu::meet_warpgroup("wgmma.rows", mine, [](WgmmaArguments** threads) {
        start_product([d = accumulators_of(threads), its = *threads[0]] {
            const SharedMatrix<T> left(its.a_descriptor), right(its.b);
            multiply_group<n>(
                d, its.accumulate, [&](int row, int k) { return left.by_rows(row, k); },
                [&](int k, int column) { return right.by_rows(column, k); });
        });
    });
}

template <class T, int n>
void wgmma_columns(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b) {
    WgmmaArguments mine{d[0], a, 0, b, true};
    emu::meet_warpgroup("wgmma.columns", mine, [](WgmmaArguments** threads) {
        std::array<const uint32_t*, 128> registers;
        for (int i = 0; i < 128; ++i) registers[i] = threads[i]->a;
        start_product([d = accumulators_of(threads), registers, b = threads[0]->b] {
            const SharedMatrix<T> right(b);
            const auto left = [&](int row, int k) {
                const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
                const Float2 pair = unpack<T>(registers[thread][row % 16 / 8 + k / 8 * 2]);
                return k % 2 ? pair.y : pair.x;
            };
            multiply_group<n>(d, true, left, [&](int k, int column) { return right.by_columns(column, k); });
        });
    });
}

}  // namespace meditron
