// Attention on the CPU: threads, scratch memory and the choice of instruction set around the kernels.

#pragma once

#include <cstdint>

#include "../attention.h"

namespace meditron {

// Runs work(context, thread) for thread = 0 .. num_threads - 1, at the same time, and returns when all have ended.
struct Threads {
    int num_threads;
    void (*run)(int num_threads, void (*work)(void* context, int thread), void* context);
};

// Names of the instruction sets that this build has and this processor runs, best first, separated by spaces.
const char* cpu_instruction_sets();

// Null where the CPU takes the problem, else what it cannot do.
const char* cpu_attention_unsupported(const AttentionProblem&);

// `instruction_set` null: the best. Both are deterministic, also from one number of threads to another.
// Throw std::invalid_argument for an instruction set that is not there, std::bad_alloc without memory.
void cpu_attention_forward(const AttentionForward&, const char* instruction_set, const Threads&);
void cpu_attention_backward(const AttentionBackward&, const char* instruction_set, const Threads&);

}  // namespace meditron
