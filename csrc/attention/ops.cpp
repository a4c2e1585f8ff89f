// torch.ops.meditron.*: packed attention as torch operators, through LibTorch's stable ABI alone, so that one binary
// serves every torch from 2.10 on, with and without CUDA.
//
// Everything an operator is given is checked here, also values, as a wrong boundary would read outside the tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../torch_tensors.h"
#include "attention.h"
#include "cpu/cpu.h"
#ifdef MEDITRON_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launch.h"
#endif

namespace {

using meditron::ask_for_huge_pages;
using meditron::AttentionProblem;
using meditron::c_string;
using meditron::Heads;
using meditron::refuse;
using meditron::shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_like(const Tensor& x, const char* name, const Tensor& q, int64_t tokens, int64_t heads) {
    if (x.dim() != 3 || x.size(0) != tokens || x.size(1) != heads || x.size(2) != q.size(2))
        refuse(name, " has the shape ", shape(x), " instead of [", tokens, ", ", heads, ", ", q.size(2), "]");
    if (x.scalar_type() != q.scalar_type()) refuse(name, " has another dtype than q");
    if (!(x.device() == q.device())) refuse(name, " is on another device than q");
}

// The kernels read heads whose channels lie together; anything else is copied once.
Tensor with_dense_channels(const Tensor& x) {
    return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

std::vector<int64_t> boundaries(const Tensor& x, const char* name, int64_t total) {
    if (!x.is_cpu()) refuse(name, " must be on the CPU: reading it from a GPU would wait for the GPU");
    if (x.dim() != 1 || x.size(0) < 1) refuse(name, " must be a 1-D tensor that starts at 0, not of shape ", shape(x));
    std::vector<int64_t> values(static_cast<size_t>(x.size(0)));
    const Tensor dense = torch::stable::contiguous(x);
    for (size_t i = 0; i < values.size(); ++i) {
        if (x.scalar_type() == ScalarType::Int)
            values[i] = static_cast<const int32_t*>(dense.const_data_ptr())[i];
        else if (x.scalar_type() == ScalarType::Long)
            values[i] = static_cast<const int64_t*>(dense.const_data_ptr())[i];
        else
            refuse(name, " must be int32 or int64");
        if (i == 0 && values[0] != 0) refuse(name, " must start at 0, not at ", values[0]);
        if (i > 0 && values[i] < values[i - 1])
            refuse(name, " decreases from ", values[i - 1], " to ", values[i], " at index ", i);
    }
    if (values.back() != total) refuse(name, " ends at ", values.back(), ", but there are ", total, " tokens");
    return values;
}

// A checked problem with everything its pointers refer to.
struct Inputs {
    Tensor q, k, v;
    std::vector<int64_t> cu_queries, cu_keys;
    OptionalTensor cos, sin, q_positions, k_positions;
    AttentionProblem problem{};

    Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
           const Tensor& cu_seqlens_k, const OptionalTensor& cosines, const OptionalTensor& sines,
           const OptionalTensor& positions_q, const OptionalTensor& positions_k, double softmax_scale, int64_t window)
        : q(query), k(key), v(value) {
        if (q.dim() != 3 || k.dim() != 3 || q.size(2) < 1)
            refuse("packed attention wants q [T, N, D] and k, v [S, K, D]; got q ", shape(q), ", k ", shape(k));
        const int64_t num_kv_heads = k.size(1);
        if (num_kv_heads < 1 || q.size(1) % num_kv_heads != 0)
            refuse(q.size(1), " query heads are not a multiple of ", num_kv_heads, " key/value heads");
        check_like(k, "k", q, k.size(0), num_kv_heads);
        check_like(v, "v", q, k.size(0), num_kv_heads);
        if (window < 0) refuse("window is ", window, "; it is a number of keys, or 0 for all");
        window = std::min(window, k.size(0));  // more keys there are not, and the kernels add to it
        cu_queries = boundaries(cu_seqlens_q, "cu_seqlens", q.size(0));
        cu_keys = boundaries(cu_seqlens_k, "cu_seqlens_kv", k.size(0));
        if (cu_queries.size() != cu_keys.size())
            refuse("cu_seqlens has ", cu_queries.size() - 1, " documents and cu_seqlens_kv ", cu_keys.size() - 1);
        for (size_t i = 0; i + 1 < cu_queries.size(); ++i)
            if (cu_queries[i + 1] - cu_queries[i] > cu_keys[i + 1] - cu_keys[i])
                refuse("document ", i, " has ", cu_queries[i + 1] - cu_queries[i], " queries but only ",
                       cu_keys[i + 1] - cu_keys[i], " keys");
        q = with_dense_channels(q), k = with_dense_channels(k), v = with_dense_channels(v);
        problem = {meditron::dtype_of(q, "packed attention"),
                   q.size(0),
                   k.size(0),
                   q.size(1),
                   num_kv_heads,
                   q.size(2),
                   static_cast<int64_t>(cu_queries.size()) - 1,
                   cu_queries.data(),
                   cu_keys.data(),
                   window,
                   static_cast<float>(softmax_scale),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};
        if (cosines) set_rotation(*cosines, sines, positions_q, positions_k);
    }
    Inputs(const Inputs&) = delete;
    Inputs& operator=(const Inputs&) = delete;

private:
    void set_rotation(const Tensor& cosines, const OptionalTensor& sines, const OptionalTensor& positions_q,
                      const OptionalTensor& positions_k) {
        if (!sines) refuse("cos is given without sin");
        const int64_t half = q.size(2) / 2;
        for (const Tensor& table : {cosines, *sines}) {
            if (table.dim() != 2 || table.size(1) != half || table.size(0) != cosines.size(0) || q.size(2) % 2 != 0)
                refuse("cos and sin must have the shape [positions, ", half, "], not ", shape(table));
            if (table.scalar_type() != ScalarType::Float) refuse("cos and sin must be float32");
            if (!(table.device() == q.device())) refuse("cos and sin must be on the device of q");
        }
        cos = aligned_table(cosines), sin = aligned_table(*sines);
        q_positions = checked_positions(positions_q, "q_positions", q.size(0), cosines.size(0));
        k_positions = checked_positions(positions_k, "k_positions", k.size(0), cosines.size(0));
        problem.cos = static_cast<const float*>(cos->const_data_ptr());
        problem.sin = static_cast<const float*>(sin->const_data_ptr());
        const auto data = [](const OptionalTensor& x) {
            return x ? static_cast<const int64_t*>(x->const_data_ptr()) : nullptr;
        };
        problem.q_positions = data(q_positions), problem.k_positions = data(k_positions);
    }

    // The CUDA kernels load 16 bytes at a time.
    static Tensor aligned_table(const Tensor& x) {
        const Tensor dense = torch::stable::contiguous(x);
        return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
    }

    OptionalTensor checked_positions(const OptionalTensor& positions, const char* name, int64_t tokens, int64_t rows) {
        if (!positions) {
            if (rows < tokens) refuse("cos and sin have ", rows, " rows for ", tokens, " tokens: give ", name);
            return std::nullopt;
        }
        if (positions->dim() != 1 || positions->size(0) != tokens || positions->scalar_type() != ScalarType::Long)
            refuse(name, " must be int64 [", tokens, "], not of shape ", shape(*positions));
        if (!(positions->device() == q.device())) refuse(name, " must be on the device of q");
        Tensor dense = torch::stable::contiguous(*positions);
        if (dense.is_cpu()) {  // to look at the values on a GPU would be to wait for it: there the caller must know
            const auto* values = static_cast<const int64_t*>(dense.const_data_ptr());
            for (int64_t i = 0; i < tokens; ++i)
                if (values[i] < 0 || values[i] >= rows)
                    refuse(name, "[", i, "] is ", values[i], ", but cos and sin have ", rows, " rows");
        }
        return dense;
    }
};

Tensor empty_like_heads(const Tensor& x) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
    if (y.is_cpu()) ask_for_huge_pages(y);
    return y;
}

Tensor empty_lse(const Tensor& q) { return torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float); }

// --------------------------------------------------------------------------------------------------------- CPU

void run_in_torch_pool(int num_threads, void (*work)(void*, int), void* context) {
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) work(context, static_cast<int>(thread));
    });
}

meditron::Threads torch_threads() { return {static_cast<int>(torch::stable::get_num_threads()), run_in_torch_pool}; }

void check_cpu(const AttentionProblem& problem) {
    if (const char* reason = meditron::cpu_attention_unsupported(problem))
        refuse("packed attention on the CPU: ", reason, " (", problem.head_dim, ")");
}

std::tuple<Tensor, Tensor> forward_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_kv,
                                       OptionalTensor cos, OptionalTensor sin, OptionalTensor q_positions,
                                       OptionalTensor k_positions, double softmax_scale, int64_t window,
                                       std::optional<std::string> instruction_set) {
    const Inputs in(q, k, v, cu_seqlens, cu_seqlens_kv, cos, sin, q_positions, k_positions, softmax_scale, window);
    check_cpu(in.problem);
    Tensor out = empty_like_heads(q), lse = empty_lse(q);
    meditron::cpu_attention_forward(
        {in.problem, heads(in.q), heads(in.k), heads(in.v), heads(out), static_cast<float*>(lse.data_ptr())},
        c_string(instruction_set), torch_threads());
    return {out, lse};
}

struct BackwardInputs : Inputs {
    Tensor out, grad_out, lse, dq, dk, dv;

    template <class... Rest>
    BackwardInputs(const Tensor& grad, const Tensor& output, const Tensor& log_sums, const Tensor& query,
                   const Rest&... rest)
        : Inputs(query, rest...), out(output), grad_out(grad), lse(torch::stable::contiguous(log_sums)) {
        check_like(out, "out", q, q.size(0), q.size(1));
        check_like(grad_out, "grad_out", q, q.size(0), q.size(1));
        if (lse.dim() != 2 || lse.size(0) != q.size(1) || lse.size(1) != q.size(0) ||
            lse.scalar_type() != ScalarType::Float || !(lse.device() == q.device()))
            refuse("lse must be float32 [", q.size(1), ", ", q.size(0), "] on the device of q, not of shape ",
                   shape(lse));
        out = with_dense_channels(out), grad_out = with_dense_channels(grad_out);
        dq = empty_like_heads(q), dk = empty_like_heads(k), dv = empty_like_heads(v);
    }

    meditron::AttentionBackward arguments() const {
        return {problem,         heads(q),  heads(k),  heads(v),  heads(out),
                heads(grad_out), heads(dq), heads(dk), heads(dv), static_cast<const float*>(lse.const_data_ptr())};
    }
};

std::tuple<Tensor, Tensor, Tensor> backward_cpu(Tensor grad_out, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                Tensor cu_seqlens, Tensor cu_seqlens_kv, OptionalTensor cos,
                                                OptionalTensor sin, OptionalTensor q_positions,
                                                OptionalTensor k_positions, double softmax_scale, int64_t window,
                                                std::optional<std::string> instruction_set) {
    const BackwardInputs in(grad_out, out, lse, q, k, v, cu_seqlens, cu_seqlens_kv, cos, sin, q_positions, k_positions,
                            softmax_scale, window);
    check_cpu(in.problem);
    meditron::cpu_attention_backward(in.arguments(), c_string(instruction_set), torch_threads());
    return {in.dq, in.dk, in.dv};
}

// -------------------------------------------------------------------------------------------------------- CUDA

#ifdef MEDITRON_WITH_CUDA

// The kernels load 16 bytes at a time; views that begin elsewhere are copied.
Tensor aligned(const Tensor& x) {
    const auto item = static_cast<int64_t>(x.element_size());
    const auto misfit = reinterpret_cast<int64_t>(x.data_ptr()) | (x.stride(0) * item) | (x.stride(1) * item);
    if (misfit % 16 == 0) return x;
    return torch::stable::contiguous(torch::stable::clone(x));
}

// torch's CUDA library is not linked, as it is not everywhere: it is loaded already wherever there is a CUDA tensor.
void* current_stream(const Tensor& x) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    void* stream = nullptr;
    if (!function || function(x.get_device_index(), &stream) != 0)
        refuse(
            "this torch does not tell its current CUDA stream: packed attention by our kernels is not possible with "
            "it");
    return stream;
}

template <class Arguments>
void run_cuda(const Tensor& q, const Arguments& arguments, int64_t (*workspace_bytes)(const Arguments*),
              const char* (*launch)(const Arguments*, void*, void*)) {
    if (const char* reason = meditron_cuda_attention_unsupported(&arguments.problem))
        refuse("packed attention on CUDA: ", reason);
    const Tensor workspace =
        torch::stable::new_empty(q, {std::max<int64_t>(workspace_bytes(&arguments), 16)}, ScalarType::Byte);
    if (const char* reason = launch(&arguments, workspace.data_ptr(), current_stream(q)))
        refuse("packed attention on CUDA: ", reason);
}

std::tuple<Tensor, Tensor> forward_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_kv,
                                        OptionalTensor cos, OptionalTensor sin, OptionalTensor q_positions,
                                        OptionalTensor k_positions, double softmax_scale, int64_t window,
                                        std::optional<std::string>) {
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    Inputs in(q, k, v, cu_seqlens, cu_seqlens_kv, cos, sin, q_positions, k_positions, softmax_scale, window);
    in.q = aligned(in.q), in.k = aligned(in.k), in.v = aligned(in.v);
    Tensor out = empty_like_heads(q), lse = empty_lse(q);
    run_cuda<meditron::AttentionForward>(
        q, {in.problem, heads(in.q), heads(in.k), heads(in.v), heads(out), static_cast<float*>(lse.data_ptr())},
        meditron_cuda_attention_forward_workspace, meditron_cuda_attention_forward);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(Tensor grad_out, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                 Tensor cu_seqlens, Tensor cu_seqlens_kv, OptionalTensor cos,
                                                 OptionalTensor sin, OptionalTensor q_positions,
                                                 OptionalTensor k_positions, double softmax_scale, int64_t window,
                                                 std::optional<std::string>) {
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    BackwardInputs in(grad_out, out, lse, q, k, v, cu_seqlens, cu_seqlens_kv, cos, sin, q_positions, k_positions,
                      softmax_scale, window);
    for (Tensor* x : {&in.q, &in.k, &in.v, &in.out, &in.grad_out}) *x = aligned(*x);
    run_cuda<meditron::AttentionBackward>(q, in.arguments(), meditron_cuda_attention_backward_workspace,
                                          meditron_cuda_attention_backward);
    return {in.dq, in.dk, in.dv};
}

#endif

std::string cpu_instruction_sets() { return meditron::cpu_instruction_sets(); }

bool built_with_cuda() {
#ifdef MEDITRON_WITH_CUDA
    return true;
#else
    return false;
#endif
}

}  // namespace

#define MEDITRON_ATTENTION_INPUTS                                                                       \
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_kv, Tensor? cos, Tensor? sin, " \
    "Tensor? q_positions, Tensor? k_positions, float softmax_scale, int window, "                       \
    "str? instruction_set"

STABLE_TORCH_LIBRARY(meditron, library) {
    library.def("packed_attention(" MEDITRON_ATTENTION_INPUTS ") -> (Tensor, Tensor)");
    library.def("packed_attention_backward(Tensor grad_out, Tensor out, Tensor lse, " MEDITRON_ATTENTION_INPUTS
                ") -> (Tensor, Tensor, Tensor)");
    library.def("cpu_instruction_sets() -> str");
    library.def("built_with_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(meditron, CPU, library) {
    library.impl("packed_attention", TORCH_BOX(&forward_cpu));
    library.impl("packed_attention_backward", TORCH_BOX(&backward_cpu));
}

#ifdef MEDITRON_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(meditron, CUDA, library) {
    library.impl("packed_attention", TORCH_BOX(&forward_cuda));
    library.impl("packed_attention_backward", TORCH_BOX(&backward_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(meditron, CompositeExplicitAutograd, library) {
    library.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
    library.impl("built_with_cuda", TORCH_BOX(&built_with_cuda));
}
