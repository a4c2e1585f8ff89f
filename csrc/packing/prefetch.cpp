#include "prefetch.h"

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace meditron {

std::vector<int32_t> Job::run(int64_t micro_batch) const {
    const int64_t first = micro_batch * samples_per_micro_batch, at = first * seq_len;
    try {
        return gather(samples.data() + first, samples_per_micro_batch, seq_len, vocab_size,
                      {out.tokens + at, out.labels + at, out.positions + at, out.loss_mask + at});
    } catch (BadToken& bad) {
        bad.sample += first;
        throw;
    }
}

JobResult run_job(const Job& job) {
    JobResult result;
    for (int64_t i = 0; i < job.num_micro_batches(); ++i) result.push_back(job.run(i));
    return result;
}

namespace {

struct RunningJob {
    explicit RunningJob(Job&& job_)
        : job(std::move(job_)),
          num_left(job.num_micro_batches()),
          result(static_cast<size_t>(num_left)),
          errors(static_cast<size_t>(num_left)) {}

    Job job;
    int64_t next = 0;  // micro-batch to begin
    int64_t num_left;  // not finished
    JobResult result;
    std::vector<std::exception_ptr> errors;
};

}  // namespace

struct Prefetcher::State {
    const pid_t process = getpid();
    std::mutex mutex;
    std::condition_variable work_came, job_done;
    std::deque<std::unique_ptr<RunningJob>> jobs;  // the oldest first; taken away by take() alone
    bool closing = false;
    std::vector<std::thread> threads;

    RunningJob* with_work() {
        for (const auto& job : jobs)
            if (job->next < job->job.num_micro_batches()) return job.get();
        return nullptr;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            RunningJob* running = nullptr;
            work_came.wait(lock, [&] { return closing || (running = with_work()) != nullptr; });
            if (closing) return;
            const int64_t micro_batch = running->next++;
            const size_t i = static_cast<size_t>(micro_batch);
            lock.unlock();
            try {
                running->result[i] = running->job.run(micro_batch);
            } catch (...) {
                running->errors[i] = std::current_exception();
            }
            lock.lock();
            if (--running->num_left == 0) job_done.notify_all();
        }
    }
};

Prefetcher::Prefetcher(int64_t num_threads) {
    if (num_threads < 1)
        throw std::invalid_argument("a prefetcher needs at least 1 thread, not " + std::to_string(num_threads));
    auto state = std::make_unique<State>();
    try {
        for (int64_t i = 0; i < num_threads; ++i) state->threads.emplace_back([s = state.get()] { s->work(); });
    } catch (const std::system_error&) {
        if (state->threads.empty()) throw;  // fewer than wanted will do
    }
    state_ = state.release();
}

Prefetcher::~Prefetcher() {
    if (getpid() != state_->process) return;  // its threads, and whoever held the mutex, are in the parent
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->closing = true;
    }
    state_->work_came.notify_all();
    for (std::thread& thread : state_->threads) thread.join();
    delete state_;
}

void Prefetcher::check_process() const {
    if (getpid() != state_->process)
        throw std::logic_error("the prefetching threads belong to process " + std::to_string(state_->process) +
                               ": a forked child needs a loader of its own");
}

void Prefetcher::submit(Job job) {
    check_process();
    auto running = std::make_unique<RunningJob>(std::move(job));
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->jobs.push_back(std::move(running));
    }
    state_->work_came.notify_all();
}

JobResult Prefetcher::take() {
    check_process();
    std::unique_ptr<RunningJob> done;
    {
        std::unique_lock<std::mutex> lock(state_->mutex);
        if (state_->jobs.empty()) throw std::logic_error("no job was submitted");
        state_->job_done.wait(lock, [&] { return state_->jobs.front()->num_left == 0; });
        done = std::move(state_->jobs.front());
        state_->jobs.pop_front();
    }
    for (const std::exception_ptr& error : done->errors)
        if (error) std::rethrow_exception(error);
    return std::move(done->result);
}

}  // namespace meditron
