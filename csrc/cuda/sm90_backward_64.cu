#include "sm90_backward.cuh"

namespace meditron {
template const char* launch_backward_sm90<BFloat16, 64>(const AttentionBackward&, void*, void*);
template const char* launch_backward_sm90<Float16, 64>(const AttentionBackward&, void*, void*);
}  // namespace meditron
