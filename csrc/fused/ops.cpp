// torch.ops.meditron.*: the fused pieces as torch operators on the CPU, through LibTorch's stable ABI. See fused.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../cpu/instruction_sets.h"
#include "../torch_tensors.h"
#include "fused.h"

namespace {

using namespace meditron;
using Name = std::optional<std::string>;

const FusedKernels& kernels(const Name& instruction_set) {
#if defined(__x86_64__)
    const auto tables = runnable(&avx512_fused_kernels, &avx2_fused_kernels, &portable_fused_kernels);
#else
    const auto tables = runnable<FusedKernels>(nullptr, nullptr, &portable_fused_kernels);
#endif
    return choose(tables, c_string(instruction_set));
}

// kernel(arguments, begin, end) over 0 .. count, on one thread where a unit of `unit_size` elements is not worth two.
template <class Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t count,
         int64_t unit_size) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(unit_size, 1));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

int64_t width_of(const Tensor& x, const char* taker) {
    if (x.dim() < 1 || x.size(x.dim() - 1) < 1) refuse(taker, " wants [..., width], not the shape ", shape(x));
    return x.size(x.dim() - 1);
}

void check(const Tensor& x, const char* name, const std::vector<int64_t>& sizes, const Tensor& like) {
    bool fits = x.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == sizes[static_cast<size_t>(i)];
    if (!fits) refuse(name, " has the shape ", shape(x), ", which does not fit ", shape(like));
    if (!x.is_cpu()) refuse(name, " is not on the CPU");
}

void check_type(const Tensor& x, const char* name, ScalarType type) {
    if (x.scalar_type() != type) refuse(name, " has the wrong dtype");
}

std::vector<int64_t> sizes_of(const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    return sizes;
}

Tensor make(const Tensor& like, std::vector<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
    Tensor y = torch::stable::new_empty(like, sizes, type);
    ask_for_huge_pages(y);
    return y;
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

// ------------------------------------------------------------------------------------------------------ RMSNorm

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, Name instruction_set) {
    const int64_t width = width_of(x, "rms_norm"), rows = x.numel() / width;
    check(weight, "weight", {width}, x);
    check_type(weight, "weight", x.scalar_type());
    x = torch::stable::contiguous(x), weight = torch::stable::contiguous(weight);
    Tensor y = make(x, sizes_of(x)), rstd = make(x, {rows}, ScalarType::Float);
    const auto& table = kernels(instruction_set);
    run(table.rms_norm,
        {dtype_of(x, "rms_norm"), rows, width, static_cast<float>(eps), x.const_data_ptr(), weight.const_data_ptr(),
         y.data_ptr(), static_cast<float*>(rstd.data_ptr())},
        rows, width);
    return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Name instruction_set) {
    const int64_t width = width_of(x, "rms_norm"), rows = x.numel() / width;
    check(grad, "grad", sizes_of(x), x), check(weight, "weight", {width}, x), check(rstd, "rstd", {rows}, x);
    check_type(grad, "grad", x.scalar_type()), check_type(weight, "weight", x.scalar_type());
    check_type(rstd, "rstd", ScalarType::Float);
    for (Tensor* each : {&grad, &x, &weight, &rstd}) *each = torch::stable::contiguous(*each);
    const int64_t block_rows = std::max<int64_t>(16, (rows + 63) / 64),
                  num_blocks = (rows + block_rows - 1) / block_rows;
    const int64_t num_vectors = (width + 15) / 16;
    Tensor dx = make(x, sizes_of(x)), dweight = make(x, {width});
    Tensor partials = make(x, {num_blocks, 16 * num_vectors}, ScalarType::Float);
    const RmsNormBackward f{dtype_of(x, "rms_norm"),
                            rows,
                            width,
                            grad.const_data_ptr(),
                            x.const_data_ptr(),
                            weight.const_data_ptr(),
                            floats(rstd),
                            dx.data_ptr(),
                            dweight.data_ptr(),
                            block_rows,
                            num_blocks,
                            16 * num_vectors,
                            static_cast<float*>(partials.data_ptr())};
    const auto& table = kernels(instruction_set);
    run(table.rms_norm_backward, f, num_blocks, block_rows * width);
    run(table.rms_norm_weight, f, num_vectors, 16 * num_blocks);
    return {dx, dweight};
}

// ------------------------------------------------------------------------------------------------------- SwiGLU

Tensor swiglu(Tensor x, Name instruction_set) {
    const int64_t both = width_of(x, "swiglu"), width = both / 2, rows = x.numel() / both;
    if (both % 2 != 0) refuse("swiglu wants gate and up side by side, an even width; got the shape ", shape(x));
    x = torch::stable::contiguous(x);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = width;
    Tensor y = make(x, sizes);
    run(kernels(instruction_set).swiglu, {dtype_of(x, "swiglu"), rows, width, x.const_data_ptr(), y.data_ptr()}, rows,
        both);
    return y;
}

Tensor swiglu_backward(Tensor grad, Tensor x, Name instruction_set) {
    const int64_t both = width_of(x, "swiglu"), width = both / 2, rows = x.numel() / both;
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = width;
    if (both % 2 != 0) refuse("swiglu wants gate and up side by side, an even width; got the shape ", shape(x));
    check(grad, "grad", sizes, x), check_type(grad, "grad", x.scalar_type());
    grad = torch::stable::contiguous(grad), x = torch::stable::contiguous(x);
    Tensor dx = make(x, sizes_of(x));
    run(kernels(instruction_set).swiglu_backward,
        {dtype_of(x, "swiglu"), rows, width, grad.const_data_ptr(), x.const_data_ptr(), dx.data_ptr()}, rows, both);
    return dx;
}

// ------------------------------------------------------------------------------------------------ cross-entropy

void check_logits(const Tensor& logits, const Tensor& columns, int64_t num_real) {
    if (logits.dim() != 2) refuse("logits must be [tokens, vocabulary], not of shape ", shape(logits));
    if (num_real < 0 || num_real > logits.size(1))
        refuse("num_real is ", num_real, ", but the logits have ", logits.size(1), " columns");
    check(columns, "columns", {logits.size(0)}, logits);
    check_type(columns, "columns", ScalarType::Long);
}

Tensor cross_entropy(Tensor logits, Tensor columns, int64_t num_real, Name instruction_set) {
    check_logits(logits, columns, num_real);
    logits = torch::stable::contiguous(logits), columns = torch::stable::contiguous(columns);
    const int64_t rows = logits.size(0);
    Tensor statistics = make(logits, {3, rows}, ScalarType::Float);
    auto* to = static_cast<float*>(statistics.data_ptr());
    run(kernels(instruction_set).cross_entropy,
        {dtype_of(logits, "cross_entropy"), rows, logits.size(1), num_real, logits.const_data_ptr(),
         static_cast<const int64_t*>(columns.const_data_ptr()), to, to + rows, to + 2 * rows},
        rows, num_real);
    return statistics;
}

void cross_entropy_backward_(Tensor logits, Tensor columns, Tensor largest, Tensor scale, Tensor grad, int64_t num_real,
                             Name instruction_set) {
    check_logits(logits, columns, num_real);
    if (!logits.is_contiguous()) refuse("logits to overwrite must be contiguous");
    columns = torch::stable::contiguous(columns);
    for (Tensor* each : {&largest, &scale, &grad}) {
        check(*each, "a statistic", {logits.size(0)}, logits), check_type(*each, "a statistic", ScalarType::Float);
        *each = torch::stable::contiguous(*each);
    }
    run(kernels(instruction_set).cross_entropy_backward,
        {dtype_of(logits, "cross_entropy"), logits.size(0), logits.size(1), num_real, logits.data_ptr(),
         static_cast<const int64_t*>(columns.const_data_ptr()), floats(largest), floats(scale), floats(grad)},
        logits.size(0), logits.size(1));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(meditron, library) {
    library.def("rms_norm(Tensor x, Tensor weight, float eps, str? instruction_set=None) -> (Tensor, Tensor)");
    library.def(
        "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, str? instruction_set=None) -> "
        "(Tensor, Tensor)");
    library.def("swiglu(Tensor x, str? instruction_set=None) -> Tensor");
    library.def("swiglu_backward(Tensor grad, Tensor x, str? instruction_set=None) -> Tensor");
    library.def("cross_entropy(Tensor logits, Tensor columns, int num_real, str? instruction_set=None) -> Tensor");
    library.def(
        "cross_entropy_backward_(Tensor(a!) logits, Tensor columns, Tensor largest, Tensor scale, Tensor grad, "
        "int num_real, str? instruction_set=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(meditron, CPU, library) {
    library.impl("rms_norm", TORCH_BOX(&rms_norm));
    library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    library.impl("swiglu", TORCH_BOX(&swiglu));
    library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
    library.impl("cross_entropy", TORCH_BOX(&cross_entropy));
    library.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_));
}
