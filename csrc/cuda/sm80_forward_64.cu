#include "sm80_forward.cuh"

namespace meditron {
template const char* launch_forward<BFloat16, 64>(const AttentionForward&, void*, void*);
template const char* launch_forward<Float16, 64>(const AttentionForward&, void*, void*);
}  // namespace meditron
