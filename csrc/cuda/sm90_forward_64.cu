#include "sm90_forward.cuh"

namespace meditron {
template const char* launch_forward_sm90<BFloat16, 64>(const AttentionForward&, void*, void*);
template const char* launch_forward_sm90<Float16, 64>(const AttentionForward&, void*, void*);
}  // namespace meditron
