// The pool of threads: order, errors, destruction with work left, and forked children. Also run under ThreadSanitizer.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "array.h"
#include "check.h"
#include "packing.h"
#include "prefetch.h"

using namespace meditron;

namespace {

constexpr int64_t seq_len = 32, num_samples = 64;

// Document i is sample i: 32 tokens with its number, but one with an id that is too large.
struct Dataset {
    Dataset()
        : idx(index_bytes(std::vector<int64_t>(num_samples, seq_len), 8, 2)), bin([] {
              std::vector<uint8_t> bytes;
              for (int64_t i = 0; i < num_samples * seq_len; ++i)
                  put<uint16_t>(bytes, static_cast<uint16_t>(i / seq_len));
              bytes[2 * 41 * seq_len + 1] = 0xff;
              return bytes;
          }()) {
        for (int64_t i = 0; i <= num_samples; ++i) numbers.push_back(i);
        zeros.assign(num_samples, 0);
    }

    Bytes idx, bin;
    std::vector<int64_t> numbers, zeros;
    TokenFile file{idx.data.get(), static_cast<int64_t>(idx.size), bin.data.get(), static_cast<int64_t>(bin.size)};
};

struct Buffers {
    Array<int32_t> tokens{8 * seq_len}, labels{8 * seq_len}, positions{8 * seq_len};
    Array<uint8_t> loss_mask{8 * seq_len};
};

Job job_of(const SampleIndex& index, int64_t first, Buffers& buffers) {
    Job job{{},
            2,
            seq_len,
            1000,
            {buffers.tokens.data(), buffers.labels.data(), buffers.positions.data(), buffers.loss_mask.data()}};
    for (int64_t i = 0; i < 8; ++i) job.samples.push_back({&index, first + i});
    return job;
}

void order_and_errors(const SampleIndex& index, int64_t num_threads) {
    Prefetcher pool(num_threads);
    std::vector<Buffers> buffers(num_samples / 8);
    for (int64_t i = 0; i < num_samples / 8; ++i) pool.submit(job_of(index, 8 * i, buffers[static_cast<size_t>(i)]));
    for (int64_t i = 0; i < num_samples / 8; ++i) {
        try {
            const JobResult result = pool.take();
            CHECK(i != 41 / 8 && result.size() == 4);
            for (const auto& cu_seqlens : result) CHECK((cu_seqlens == std::vector<int32_t>{0, seq_len, 2 * seq_len}));
            for (int64_t t = 0; t < 8 * seq_len; ++t)
                CHECK(buffers[static_cast<size_t>(i)].tokens[t] == 8 * i + t / seq_len);
        } catch (const BadToken& bad) {
            CHECK(i == 41 / 8 && bad.sample == 41 % 8 && bad.document == 41 && bad.token == (0xff00 | 41));
        }
    }
    try {
        pool.take();
        CHECK(false);
    } catch (const std::logic_error&) {
    }
}

void dropped_with_work_left(const SampleIndex& index) {
    for (int64_t take = 0; take < 3; ++take) {
        std::vector<Buffers> buffers(20);
        Prefetcher pool(3);
        for (Buffers& some : buffers) pool.submit(job_of(index, 0, some));
        for (int64_t i = 0; i < take; ++i) pool.take();
    }
}

void forked_child(const SampleIndex& index) {
    Buffers buffers;
    auto pool = std::make_unique<Prefetcher>(2);
    pool->submit(job_of(index, 0, buffers));
    const pid_t child = fork();
    if (child == 0) {
        try {
            pool->take();
            _exit(1);
        } catch (const std::logic_error&) {
        }
        pool.reset();  // must not wait for threads that are not there
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(pool->take().size() == 4);
}

}  // namespace

int main(int argc, char**) {
    const Dataset data;
    const Numbers numbers{data.numbers.data(), num_samples, true},
        boundaries{data.numbers.data(), num_samples + 1, true};
    const SampleIndex index(data.file, numbers, {data.zeros.data(), num_samples, true}, boundaries, numbers, seq_len,
                            false);
    for (const int64_t num_threads : {1, 2, 5})
        for (int repetition = 0; repetition < 10; ++repetition) order_and_errors(index, num_threads);
    dropped_with_work_left(index);
    if (argc == 1) forked_child(index);  // ThreadSanitizer does not follow forks of programs with threads
    std::puts("ok");
}
