// Which of the files compiled for one instruction set each this processor may run.

#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace meditron {

// The tables of kernels of one kind that this build has and this processor runs, best first.
template <class Kernels>
std::vector<const Kernels*> runnable(const Kernels* avx512, const Kernels* avx2, const Kernels* portable) {
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        kernels.push_back(avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(avx2);
#else
    (void)avx512, (void)avx2;
#endif
    kernels.push_back(portable);
    return kernels;
}

// The best of them, or the one of that name. Throws std::invalid_argument where it is not there.
template <class Kernels>
const Kernels& choose(const std::vector<const Kernels*>& kernels, const char* name) {
    if (!name) return *kernels.front();
    std::string names;
    for (const Kernels* candidate : kernels) {
        if (std::strcmp(candidate->name, name) == 0) return *candidate;
        names += (names.empty() ? "" : " ") + std::string(candidate->name);
    }
    throw std::invalid_argument("instruction set '" + std::string(name) + "' is not one of: " + names);
}

}  // namespace meditron
