#include "sm80_backward.cuh"

namespace meditron {
// For sm90_backward_64.cu too, which has no kernel for other GPUs.
template const char* launch_delta<BFloat16, 64>(const AttentionBackward&, float*, void*);
template const char* launch_delta<Float16, 64>(const AttentionBackward&, float*, void*);
template const char* launch_backward<BFloat16, 64>(const AttentionBackward&, void*, void*);
template const char* launch_backward<Float16, 64>(const AttentionBackward&, void*, void*);
}  // namespace meditron
