#include "sm80_backward.cuh"

namespace meditron {
template const char* launch_backward<BFloat16, 96>(const AttentionBackward&, void*, void*);
template const char* launch_backward<Float16, 96>(const AttentionBackward&, void*, void*);
}  // namespace meditron
