// What the kernels for sm_90a share: buffers that go from hand to hand, copying, and who does which item of work.

#pragma once

#include "runtime.cuh"
#include "schedule.h"
#include "sm90_ptx.cuh"
#include "tile.cuh"

namespace meditron {

// A buffer of shared memory at one of its uses. `full`: all copying threads have written it. `empty`: all who read it
// are done with it.
struct RingBuffer {
    unsigned char* tile;
    SharedBarrier *full, *empty;
    int use;  // how often it was used before

    // Parity of the phase of `full` that ends when this use can be read; of `empty` when it may be written.
    __device__ int filled() const { return use % 2; }
    __device__ int emptied() const { return (use + 1) % 2; }
};

// The items of the calling block, tiles times heads with the longest first: those of even rounds in ascending and of
// odd rounds in descending order of blocks, so that who got the longest of one round gets the shortest of the next.
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
// waited for, while the two before it have not been handed over. So releasing that buffer must not depend on them.
// How many chunks are rotated at once is a matter of registers.
template <class T, int D, int rows, int rotation_unroll>
class Copies {
public:
    enum Kind { plain, queries, keys };  // the latter are rotated

    static constexpr int num_threads = 128;
    using Tiles = Panels<D, rows>;

    __device__ explicit Copies(const AttentionProblem& problem) : problem_(problem) {}

    __device__ __forceinline__ void start(unsigned char* tile, SharedBarrier* full, const Rows& from, Kind kind) {
        start_copy<D, rows, num_threads, Tiles>(tile, from);
        cp_async_commit();
        cp_async_wait<2>();
        hand_over(older_);
        older_ = old_;
        old_ = {tile, full, from.token, from.num_valid, kind};
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
        int32_t token, num_valid;
        Kind kind;
    };

    __device__ __forceinline__ void hand_over(const Copy& copy) {
        if (copy.tile == nullptr) return;
        if (copy.kind != plain) {
            const Rotation rotation = copy.kind == queries ? rotation_of_queries(problem_) : rotation_of_keys(problem_);
            rotate<T, D, rows, num_threads, Tiles, rotation_unroll>(copy.tile, {nullptr, 0, copy.token, copy.num_valid},
                                                                    rotation);
        }
        fence_proxy_async();
        barrier_arrive(copy.full);
    }

    const AttentionProblem& problem_;
    Copy older_, old_;
};

}  // namespace meditron
