// Which kernel takes which problem. The kernels are instantiated in one file per pass and head size, to be compiled
// side by side.

#include <algorithm>

#include "launch.h"
#include "sm80_backward.cuh"
#include "sm80_forward.cuh"
#include "sm90_backward.cuh"
#include "sm90_forward.cuh"

namespace meditron {

#define MEDITRON_DECLARE(D)                                                                           \
    extern template const char* launch_forward<BFloat16, D>(const AttentionForward&, void*, void*);   \
    extern template const char* launch_forward<Float16, D>(const AttentionForward&, void*, void*);    \
    extern template const char* launch_backward<BFloat16, D>(const AttentionBackward&, void*, void*); \
    extern template const char* launch_backward<Float16, D>(const AttentionBackward&, void*, void*);
MEDITRON_DECLARE(64)
MEDITRON_DECLARE(80)
MEDITRON_DECLARE(96)
MEDITRON_DECLARE(128)
MEDITRON_DECLARE(256)
#undef MEDITRON_DECLARE

#define MEDITRON_DECLARE(D)                                                                                \
    extern template const char* launch_forward_sm90<BFloat16, D>(const AttentionForward&, void*, void*);   \
    extern template const char* launch_forward_sm90<Float16, D>(const AttentionForward&, void*, void*);    \
    extern template const char* launch_backward_sm90<BFloat16, D>(const AttentionBackward&, void*, void*); \
    extern template const char* launch_backward_sm90<Float16, D>(const AttentionBackward&, void*, void*);
MEDITRON_DECLARE(64)
MEDITRON_DECLARE(128)
#undef MEDITRON_DECLARE

namespace {

template <int D>
struct HeadDim {
    static constexpr int value = D;
};

// visit(HeadDim<D>{}) for the D of the problem; `otherwise` where no kernel has it.
template <class Result, class Visit>
Result for_head_dim(int64_t head_dim, Result otherwise, Visit visit) {
    switch (head_dim) {
        case 64: return visit(HeadDim<64>{});
        case 80: return visit(HeadDim<80>{});
        case 96: return visit(HeadDim<96>{});
        case 128: return visit(HeadDim<128>{});
        case 256: return visit(HeadDim<256>{});
        default: return otherwise;
    }
}

template <int D>
constexpr int64_t shared_bytes_needed() {
    return std::max({ForwardShape<D>::shared_bytes, KeyGradShape<D>::shared_bytes, QueryGradShape<D>::shared_bytes});
}

// On compute capability 9 there are kernels of its own for these head sizes.
template <int D>
constexpr bool has_sm90_kernels = D == 64 || D == 128;

template <class T, int D>
const char* start_forward(const AttentionForward& given, void* workspace, void* stream) {
    if constexpr (has_sm90_kernels<D>) {
        static_assert(HopperForwardShape<D>::rows == ForwardShape<D>::tile_queries, "both want the same workspace");
        if (compute_capability() == 9 && max_shared_bytes() >= HopperForwardShape<D>::shared_bytes)
            return launch_forward_sm90<T, D>(given, workspace, stream);
    }
    return launch_forward<T, D>(given, workspace, stream);
}

template <class T, int D>
const char* start_backward(const AttentionBackward& given, void* workspace, void* stream) {
    if constexpr (has_sm90_kernels<D>) {
        static_assert(HopperBackwardShape<D>::own_rows >= KeyGradShape<D>::tile_keys &&
                          HopperBackwardShape<D>::own_rows >= QueryGradShape<D>::tile_queries,
                      "the workspace is that of the kernels for sm_80");
        if (compute_capability() == 9 && max_shared_bytes() >= HopperBackwardShape<D>::shared_bytes)
            return launch_backward_sm90<T, D>(given, workspace, stream);
    }
    return launch_backward<T, D>(given, workspace, stream);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* misaligned(std::initializer_list<Heads> tensors, const void* workspace) {
    for (const Heads& heads : tensors)
        if (!aligned(heads.data) || heads.token_stride % 8 != 0 || heads.head_stride % 8 != 0)
            return "data and strides of q, k, v, out and their gradients must be multiples of 16 bytes";
    return aligned(workspace) ? nullptr : "the workspace must be aligned to 16 bytes";
}

}  // namespace
}  // namespace meditron

using namespace meditron;

const char* meditron_cuda_attention_unsupported(const AttentionProblem* problem) {
    constexpr int64_t most_tokens = int64_t{1} << 30;  // positions and windows add up in 32 bits
    if (problem->dtype != DType::bfloat16 && problem->dtype != DType::float16)
        return "the CUDA kernels take bf16 and fp16 only";
    const int64_t shared_bytes = for_head_dim(problem->head_dim, int64_t{-1},
                                              [](auto dim) { return shared_bytes_needed<decltype(dim)::value>(); });
    if (shared_bytes < 0) return "the CUDA kernels take head sizes 64, 80, 96, 128 and 256 only";
    if (problem->num_queries >= most_tokens || problem->num_keys >= most_tokens)
        return "the CUDA kernels take fewer than 2^30 tokens";
    // Tiles have 64 rows or more; blocks of a grid are counted in 31 bits.
    if ((max_num_tiles(problem->num_keys, problem->num_documents, 64)) * problem->num_heads > INT32_MAX)
        return "too many tiles of tokens times heads for one grid of the CUDA kernels";
    if (!(problem->softmax_scale > 0)) return "the CUDA kernels want a positive softmax_scale";
    if (!aligned(problem->cos) || !aligned(problem->sin)) return "the rotation tables must be aligned to 16 bytes";
    if (max_shared_bytes() < shared_bytes)
        return "there is no CUDA device, or it has too little shared memory for this head size";
    return nullptr;
}

int64_t meditron_cuda_attention_forward_workspace(const AttentionForward* given) {
    const AttentionProblem& problem = given->problem;
    return for_head_dim(problem.head_dim, int64_t{0}, [&](auto dim) {
        constexpr int64_t rows = ForwardShape<decltype(dim)::value>::tile_queries;
        return max_num_tiles(problem.num_queries, problem.num_documents, rows) * int64_t{sizeof(Tile)};
    });
}

int64_t meditron_cuda_attention_backward_workspace(const AttentionBackward* given) {
    return for_head_dim(given->problem.head_dim, int64_t{0},
                        [&](auto dim) { return BackwardWorkspace<decltype(dim)::value>(given->problem).end; });
}

const char* meditron_cuda_attention_forward(const AttentionForward* given, void* workspace, void* stream) {
    if (const char* reason = meditron_cuda_attention_unsupported(&given->problem)) return reason;
    if (const char* reason = misaligned({given->q, given->k, given->v, given->out}, workspace)) return reason;
    return for_head_dim<const char*>(given->problem.head_dim, nullptr, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        return given->problem.dtype == DType::bfloat16 ? start_forward<BFloat16, D>(*given, workspace, stream)
                                                       : start_forward<Float16, D>(*given, workspace, stream);
    });
}

const char* meditron_cuda_attention_backward(const AttentionBackward* given, void* workspace, void* stream) {
    if (const char* reason = meditron_cuda_attention_unsupported(&given->problem)) return reason;
    const std::initializer_list<Heads> tensors = {given->q,        given->k,  given->v,  given->out,
                                                  given->grad_out, given->dq, given->dk, given->dv};
    if (const char* reason = misaligned(tensors, workspace)) return reason;
    return for_head_dim<const char*>(given->problem.head_dim, nullptr, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        return given->problem.dtype == DType::bfloat16 ? start_backward<BFloat16, D>(*given, workspace, stream)
                                                       : start_backward<Float16, D>(*given, workspace, stream);
    });
}
