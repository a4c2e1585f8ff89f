// A pool of threads that gathers micro-batches ahead. Its threads never touch Python.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "gather.h"

namespace meditron {

// The micro-batches of one step on one rank: samples one after the other, samples_per_micro_batch in each, written
// one after the other into the arrays.
struct Job {
    std::vector<SampleRef> samples;
    int64_t samples_per_micro_batch, seq_len, vocab_size;
    BatchArrays out;

    int64_t num_micro_batches() const { return static_cast<int64_t>(samples.size()) / samples_per_micro_batch; }
    // Gathers one micro-batch. BadToken names the sample by its place in the job.
    std::vector<int32_t> run(int64_t micro_batch) const;
};

// The boundaries of each micro-batch's segments.
using JobResult = std::vector<std::vector<int32_t>>;

// Gathers all of a job in the caller's thread.
JobResult run_job(const Job& job);

// Jobs come out in the order they went in. What a job points to must outlive it.
// After a fork the child has the object but none of its threads: there, take() throws and the destructor does nothing.
class Prefetcher {
public:
    explicit Prefetcher(int64_t num_threads);
    // Forgets the jobs not yet begun and waits for those that are.
    ~Prefetcher();
    Prefetcher(const Prefetcher&) = delete;
    Prefetcher& operator=(const Prefetcher&) = delete;

    // Returns at once; how many jobs wait is for the caller to bound.
    void submit(Job job);
    // Waits for the oldest job. What one of its micro-batches threw is rethrown, that of the first one. Throws
    // std::logic_error when there is no job, and in a forked child.
    JobResult take();

private:
    struct State;
    void check_process() const;
    State* state_;
};

}  // namespace meditron
