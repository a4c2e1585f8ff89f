// What the kernels for sm_90a share: buffers that go from hand to hand, copying, and who does which item of work.

#pragma once

#include "runtime.cuh"
#include "schedule.h"
#include "sm90_ptx.cuh"
#include "tile.cuh"

namespace meditron {

// A buffer of shared memory at one of its uses. `full`: all copying threads have written it. `empty`: all who read it are
// done with it.
struct RingBuffer {
    unsigned char* tile;
    SharedBarrier *full, *empty;
    int use;  // how often it was used before

    __device__ void wait_full() const { barrier_wait(full, use % 2); }
    __device__ void wait_empty() const { barrier_wait(empty, (use + 1) % 2); }
};

// The items of the calling block, tiles times heads with the longest first: those of even rounds in ascending and of odd
// rounds in descending order of blocks, so that who got the longest of one round gets the shortest of the next.
// Calls visit(tile, head).
template <class Visit>
__device__ __forceinline__ void for_my_items(const Tile* tiles, int num_items, int num_heads, Visit visit) {
    const int num_blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (int round = 0; round * num_blocks < num_items; ++round) {
        const int item = round * num_blocks + (round % 2 ? num_blocks - 1 - block : block);
        if (item < num_items) visit(tiles[item / num_heads], item % num_heads);
    }
}

// Copies of tiles by the first warpgroup, which also rotates them. Up to three are under way: a buffer is filled, and
// waited for, while the two before it have not been handed over. So nobody may need these to give that buffer back.
template <class T, int D, int rows>
class Copies {
public:
    static constexpr int num_threads = 128;
    using Tiles = Panels<D, rows>;

    __device__ __forceinline__ void start(unsigned char* tile, SharedBarrier* full, const Rows& from,
                                          const Rotation& rotation) {
        start_copy<D, rows, num_threads, Tiles>(tile, from);
        cp_async_commit();
        cp_async_wait<2>();
        hand_over(older_);
        older_ = old_;
        old_ = {tile, full, from, rotation};
    }

    __device__ __forceinline__ void finish() {
        cp_async_wait<0>();
        hand_over(older_);
        hand_over(old_);
    }

private:
    struct Copy {
        unsigned char* tile = nullptr;
        SharedBarrier* full;
        Rows from;
        Rotation rotation;
    };

    __device__ __forceinline__ void hand_over(const Copy& copy) {
        if (copy.tile == nullptr) return;
        rotate<T, D, rows, num_threads, Tiles>(copy.tile, copy.from, copy.rotation);
        fence_proxy_async();
        barrier_arrive(copy.full);
    }

    Copy older_, old_;
};

}  // namespace meditron
