// Runs CUDA kernels on a CPU: a thread of a block is a fiber, and the fibers of a block take turns on one processor.
//
// What is checked: a warp runs ahead of the others until it has to wait for them, in an order drawn from a seed, so a
// missing barrier lets it overwrite what others still read, or read what they have not written. Shared memory starts
// as NaN. Asynchronous copies happen at once, or as late as a wait allows with NaN in their destination until then.
// Every barrier and wait is a *site* (file and line) that can be taken out, one at a time, to prove that it is missed.
// A deadlock, and lanes of a warp that meet in different instructions, are errors.
//
// What is not: data races inside one warp without an instruction in which its lanes meet, and the memory model.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace emu {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Settings {
    uint64_t seed = 0;
    bool deferred_copies = false;  // else done at once; so are the products of warpgroups
    int removed_site = -1;         // number in `sites` of the barrier or wait that does nothing
    int capability = 8;            // of the device, its first number
};

// A copy that was started and may not have happened yet.
using Copy = std::function<void()>;

struct Thread {
    Index index;
    unsigned number, warp, lane;  // number in the block, of its warp, in the warp
    void* stack_pointer;
    std::vector<Copy> open_copies;                  // not yet in a group
    std::vector<std::vector<Copy>> pending_groups;  // oldest first
};

// A place where `size` threads meet. Also the state of a collective instruction: who is there with which arguments.
struct Meeting {
    static constexpr unsigned max_size = 128;
    unsigned arrived = 0;
    const char* instruction = nullptr;
    void* arguments[max_size];
    Thread* threads[max_size];
};

struct Barrier {
    unsigned arrived = 0, expected = 0;
    std::vector<Thread*> waiting;
};

struct Warp {
    uint32_t ready = 0;  // lanes that can run
    Meeting meeting;
    unsigned proxy_fences = 0;  // of all lanes so far
};

// Asynchronous matrix products of a warpgroup, as copies of a thread.
struct Products {
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> groups;
    bool fenced = false;  // since the last group
};

struct Waiter {
    Thread* thread;
    std::function<bool()> condition;
};

struct Site {
    const char *file, *kind;
    int line;
};

struct Block {
    Index index, dimensions, grid;
    unsigned char* shared;  // dynamic shared memory, 1024-byte aligned
    size_t shared_bytes;
    std::vector<Warp> warps;
    std::vector<Meeting> warpgroups;        // one for every four warps
    std::vector<Products> products;         // of each of them
    std::vector<unsigned char> async_view;  // shared memory as the asynchronous proxy sees it
    std::vector<Waiter> waiters;
    Barrier barriers[16];  // 0 is that of __syncthreads
};

struct Range {
    const unsigned char *begin, *end;
};

// The one machine of this process: it runs one kernel at a time.
struct Machine {
    Settings settings;
    uint64_t random_state = 0;
    Block block;
    std::string error;            // of the kernel that runs or ran last
    std::vector<Site> sites;      // every barrier and wait met so far
    std::vector<Range> readable;  // if not empty, checked copies from global memory must lie in one of these
    int64_t bank_conflicts = 0;   // extra passes over shared memory of all ldmatrix so far
};

extern Machine machine;
extern Thread* current;

inline Thread& self() { return *current; }
inline Block& block() { return machine.block; }
uint64_t random_bits();

// Stop the kernel; the launch returns the message. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Make the calling thread wait, until wake(), or until the condition holds (looked at when nothing else of its warp
// can run).
void suspend();
void wake(Thread& thread);
void wait_until(std::function<bool()> condition);

// All threads of a meeting arrive with an argument each; the last one runs act(arguments in order of rank). Then all
// go on.
template <class Argument, class Act>
void meet(Meeting& meeting, unsigned size, unsigned rank, const char* instruction, Argument& argument, Act act) {
    if (meeting.arrived > 0 && strcmp(meeting.instruction, instruction) != 0)
        fail("threads that must act together are at %s and %s", meeting.instruction, instruction);
    meeting.instruction = instruction;
    meeting.arguments[rank] = &argument;
    meeting.threads[meeting.arrived++] = current;
    if (meeting.arrived < size) return suspend();
    meeting.arrived = 0;
    act(reinterpret_cast<Argument**>(meeting.arguments));
    for (unsigned i = 0; i < size; ++i)
        if (meeting.threads[i] != current) wake(*meeting.threads[i]);
}

// The 32 lanes of the calling thread's warp.
template <class Argument, class Act>
void meet_warp(const char* instruction, Argument& argument, Act act) {
    meet(block().warps[self().warp].meeting, 32, self().lane, instruction, argument, act);
}

// The 128 threads of four consecutive warps.
template <class Argument, class Act>
void meet_warpgroup(const char* instruction, Argument& argument, Act act) {
    meet(block().warpgroups[self().warp / 4], 128, self().number % 128, instruction, argument, act);
}

// Whether the site is the one taken out. Called by everything that waits.
bool removed(const char* kind, const char* file, int line);

void barrier_sync(unsigned number, unsigned num_threads);
void barrier_arrive(unsigned number, unsigned num_threads);

// cp.async: start a copy in the calling thread, close a group, wait until at most `allowed` groups are open.
void start_copy(Copy copy);
void commit_copies();
void wait_for_copies(size_t allowed);

// Fails unless [pointer, pointer + bytes) is aligned to its size and, where ranges are known, in one of them.
void check_global(const void* pointer, size_t bytes);
// Fails unless the bytes lie in the block's shared memory, aligned to their number.
void check_shared(const void* pointer, size_t bytes);

// Runs the kernel for every block of the grid. Returns null, or what went wrong (valid until the next launch).
const char* launch(const std::function<void()>& kernel, Index grid, Index block, size_t shared_bytes);

}  // namespace emu
