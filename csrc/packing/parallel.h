// Loops over several threads. Results must not depend on how many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace meditron {

// 0 means all processors this process may use, up to 16: building an index is bound by memory, not by arithmetic.
inline int64_t threads_to_use(int64_t wanted) {
    if (wanted > 0) return wanted;
    return std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
}

// Calls work(i) for every i in 0 .. count-1, on up to num_threads threads with the caller's among them.
// When calls throw, the exception of the smallest i is rethrown, whatever the threads' timing.
template <class Work>
void parallel_for(int64_t count, int64_t num_threads, const Work& work) {
    std::vector<std::exception_ptr> errors(static_cast<size_t>(count));
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        for (int64_t i = next++; i < count; i = next++) {
            try {
                work(i);
            } catch (...) {
                errors[static_cast<size_t>(i)] = std::current_exception();
            }
        }
    };
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < std::min(num_threads, count); ++t) {
        try {
            threads.emplace_back(run);
        } catch (const std::system_error&) {
            break;  // no more threads available: the existing ones do the work
        }
    }
    run();
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

// The range 0 .. size-1 in blocks of equal length: block i is [begin(i), begin(i + 1)).
struct Blocks {
    int64_t size, count;
    int64_t begin(int64_t i) const { return size / count * i + std::min(i, size % count); }
};

// One block for each thread, but none smaller than is worth a thread.
inline Blocks blocks_for_threads(int64_t size, int64_t num_threads) {
    constexpr int64_t smallest = int64_t{1} << 17;
    return {size, std::clamp<int64_t>(size / smallest, 1, num_threads)};
}

}  // namespace meditron
