#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../../cpu/instruction_sets.h"
#include "kernel_table.h"

namespace meditron {
namespace {

std::vector<const CpuKernels*> available_kernels() {
#if defined(__x86_64__)
    auto kernels = runnable(&avx512_kernels, &avx2_kernels, &portable_kernels);
    if (kernels.front() == &avx512_kernels && __builtin_cpu_supports("avx512bf16"))
        kernels.insert(kernels.begin(), &avx512bf16_kernels);
    return kernels;
#else
    return runnable<CpuKernels>(nullptr, nullptr, &portable_kernels);
#endif
}

int64_t queries(const AttentionProblem& p, int64_t document) {
    return p.cu_queries[document + 1] - p.cu_queries[document];
}
int64_t keys(const AttentionProblem& p, int64_t document) { return p.cu_keys[document + 1] - p.cu_keys[document]; }

// The costliest units first, so that the threads end together. Documents without queries have none.
std::vector<AttentionUnit> make_units(const AttentionProblem& p, int64_t largest_unit) {
    std::vector<AttentionUnit> units;
    for (int64_t document = 0; document < p.num_documents; ++document)
        for (int64_t begin = 0; begin < queries(p, document); begin += largest_unit)
            for (int64_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head)
                units.push_back({document, kv_head, begin, std::min(begin + largest_unit, queries(p, document))});
    const auto pairs = [&](const AttentionUnit& unit) {
        const int64_t last = keys(p, unit.document) - queries(p, unit.document) + unit.end;
        return (unit.end - unit.begin) * (p.window > 0 ? std::min(last, p.window) : last);
    };
    std::stable_sort(units.begin(), units.end(),
                     [&](const AttentionUnit& a, const AttentionUnit& b) { return pairs(a) > pairs(b); });
    return units;
}

struct Scratch {
    float* data = nullptr;
    explicit Scratch(int64_t floats) {
        const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
        data = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (!data) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

template <class Arguments>
struct Job {
    const Arguments* arguments;
    void (*run_unit)(const Arguments&, const AttentionUnit&, float*);
    const std::vector<AttentionUnit>* units;
    std::vector<std::unique_ptr<Scratch>> scratch;  // one for each thread
    std::atomic<size_t> next{0};

    static void work(void* context, int thread) {
        auto& job = *static_cast<Job*>(context);
        for (size_t i = job.next++; i < job.units->size(); i = job.next++)
            job.run_unit(*job.arguments, (*job.units)[i], job.scratch[static_cast<size_t>(thread)]->data);
    }
};

template <class Arguments>
void run(const Arguments& arguments, const std::vector<AttentionUnit>& units, int64_t scratch_floats,
         void (*run_unit)(const Arguments&, const AttentionUnit&, float*), const Threads& threads) {
    if (units.empty()) return;
    const int num_threads = static_cast<int>(std::min<size_t>(static_cast<size_t>(threads.num_threads), units.size()));
    Job<Arguments> job{&arguments, run_unit, &units, {}, {}};
    for (int i = 0; i < num_threads; ++i) job.scratch.push_back(std::make_unique<Scratch>(scratch_floats));
    threads.run(num_threads, Job<Arguments>::work, &job);
}

struct Longest {
    int64_t queries = 0, keys = 0;
    explicit Longest(const AttentionProblem& p) {
        for (int64_t d = 0; d < p.num_documents; ++d) {
            queries = std::max(queries, meditron::queries(p, d));
            keys = std::max(keys, meditron::keys(p, d));
        }
    }
};

// Keys without queries are in no unit; nothing else writes their gradient.
void clear_keys_without_queries(const AttentionBackward& f) {
    const AttentionProblem& p = f.problem;
    const int64_t item = size_of(p.dtype);
    for (int64_t document = 0; document < p.num_documents; ++document) {
        if (queries(p, document) > 0) continue;
        for (int64_t key = p.cu_keys[document]; key < p.cu_keys[document + 1]; ++key)
            for (const Heads* grad : {&f.dk, &f.dv})
                for (int64_t head = 0; head < p.num_kv_heads; ++head)
                    std::memset(
                        static_cast<char*>(grad->data) + (key * grad->token_stride + head * grad->head_stride) * item,
                        0, static_cast<size_t>(p.head_dim * item));
    }
}

}  // namespace

const char* cpu_instruction_sets() {
    static const std::string names = [] {
        std::string joined;
        for (const CpuKernels* kernels : available_kernels())
            joined += (joined.empty() ? "" : " ") + std::string(kernels->name);
        return joined;
    }();
    return names.c_str();
}

const char* cpu_attention_unsupported(const AttentionProblem& p) {
    return p.head_dim > 0 && p.head_dim % 16 == 0 && p.head_dim <= 512
               ? nullptr
               : "the head size is not a multiple of 16 up to 512";
}

void cpu_attention_forward(const AttentionForward& f, const char* instruction_set, const Threads& threads) {
    const AttentionProblem& p = f.problem;
    const CpuKernels& kernels = choose(available_kernels(), instruction_set);
    // Few long documents are split, so that every thread has about eight units; each reads its keys again.
    const int64_t rows = p.num_queries * p.num_kv_heads;
    const int64_t largest_unit = std::max<int64_t>(384, rows / (8 * static_cast<int64_t>(threads.num_threads)) + 1);
    const Longest longest(p);
    run(f, make_units(p, largest_unit), kernels.forward_scratch(p, longest.queries, longest.keys), kernels.forward,
        threads);
}

void cpu_attention_backward(const AttentionBackward& f, const char* instruction_set, const Threads& threads) {
    const CpuKernels& kernels = choose(available_kernels(), instruction_set);
    const Longest longest(f.problem);
    clear_keys_without_queries(f);
    run(f, make_units(f.problem, std::max<int64_t>(longest.queries, 1)),
        kernels.backward_scratch(f.problem, longest.queries, longest.keys), kernels.backward, threads);
}

}  // namespace meditron
