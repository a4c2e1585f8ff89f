"""RMSNorm, SwiGLU and the cross-entropy's passes against float64, on every instruction set of this processor."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.native import fused, operators, rms_norm, softmax_gradient_, softmax_statistics, swiglu

# The set with bfloat16 products has kernels for attention only.
INSTRUCTION_SETS = [name for name in operators.instruction_sets() if name != "avx512bf16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}  # of one result, relative to the largest
EPS = 1e-5
OPS = torch.ops.meditron

# Of few channels RMSNorm leaves nearly nothing of a gradient: no relative error would mean anything.
shapes = st.tuples(st.integers(1, 90), st.integers(8, 140))
cases = (shapes, st.sampled_from(DTYPES), st.sampled_from(INSTRUCTION_SETS), st.integers(0, 1000))


def random(shape, dtype, seed, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=0.1)
    assert error <= tolerance, f"{error:.2e} of the largest value"


def reference_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def reference_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def compare(function, reference, inputs, grad, tolerance):
    """Output and gradients of both; the reference in float64."""
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, want = function(*inputs), reference(*exact)
    assert out.dtype == inputs[0].dtype
    assert_near(out, want, tolerance)
    gradients = torch.autograd.grad(out, inputs, grad)
    for got, expected in zip(gradients, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert got.dtype == inputs[0].dtype
        assert_near(got, expected, tolerance)


@settings(max_examples=80, deadline=None)
@given(*cases)
def test_rms_norm_equals_float64(shape, dtype, instruction_set, seed):
    x, weight, grad = (
        random(shape, dtype, seed, 3),
        random(shape[1:], dtype, seed + 1),
        random(shape, dtype, seed + 2),
    )
    compare(
        lambda x, w: OPS.rms_norm(x, w, EPS, instruction_set)[0],
        reference_norm,
        [x, weight],
        grad,
        2 * EPSILON[dtype],
    )


@settings(max_examples=80, deadline=None)
@given(*cases)
def test_swiglu_equals_float64(shape, dtype, instruction_set, seed):
    rows, width = shape
    x, grad = random((rows, 2 * width), dtype, seed, 4), random(shape, dtype, seed + 1)
    compare(lambda x: OPS.swiglu(x, instruction_set), reference_swiglu, [x], grad, 2 * EPSILON[dtype])


def expected_statistics(logits, columns, num_real):
    real = logits[:, :num_real].double()
    here = (columns >= 0) & (columns < num_real)
    largest = real.amax(1)
    label = real.gather(1, columns.clamp(0, num_real - 1)[:, None])[:, 0].where(
        here, torch.zeros(()).double()
    )
    return largest, (real - largest[:, None]).exp().sum(1), label, here


@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, "torch, by blocks of rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, num_real", [(37, 37), (64, 33), (5000, 4999), (4096, 4096), (9, 1)])
def test_cross_entropy_passes_equal_float64(width, num_real, dtype, instruction_set, monkeypatch):
    num_tokens = 23
    logits = (
        random((num_tokens, width), dtype, width, 8) - 30
    )  # all below zero: padding must not become the largest
    columns = torch.randint(-3, width + 3, (num_tokens,), generator=torch.Generator().manual_seed(1))
    grad = random((num_tokens,), torch.float32, 5)
    if instruction_set in INSTRUCTION_SETS:
        largest, total, label = OPS.cross_entropy(logits, columns, num_real, instruction_set)
    else:
        monkeypatch.setattr(fused, "_has_kernel", lambda *_: False)
        monkeypatch.setattr(fused, "_BLOCK_ELEMENTS", {"cpu": 4 * width})
        largest, total, label = softmax_statistics(logits, columns, num_real)
    expected_largest, expected_total, expected_label, here = expected_statistics(logits, columns, num_real)
    torch.testing.assert_close(largest.double(), expected_largest, rtol=0, atol=0)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(label.double(), expected_label, rtol=0, atol=0)

    expected = torch.zeros(num_tokens, width, dtype=torch.float64)
    expected[:, :num_real] = logits[:, :num_real].double().softmax(1) * grad[:, None]
    expected[torch.arange(num_tokens)[here], columns[here]] -= grad.double()[here]
    arguments = (columns, largest, grad / total, grad, num_real)
    if instruction_set in INSTRUCTION_SETS:
        OPS.cross_entropy_backward_(logits, *arguments, instruction_set)
    else:
        softmax_gradient_(logits, *arguments)
    assert_near(logits, expected, EPSILON[dtype])
    assert not logits[:, num_real:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(dtype):
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-largest, -100.0, -0.0, 0.0, 100.0, float("nan")], dtype=dtype)
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    assert swiglu(x)[0].tolist() == pytest.approx([0, 0, 0, 0, 100, float("nan")], nan_ok=True, abs=1e-3)
    rows = torch.zeros(3, 20, dtype=dtype)
    rows[1, 7] = float("nan")
    assert rms_norm(rows, torch.ones(20, dtype=dtype), EPS).isnan().any(1).tolist() == [False, True, False]
    rows[2, 3] = float("-inf")
    total = softmax_statistics(rows, torch.zeros(3, dtype=torch.int64), 20)[1]
    assert total.tolist() == pytest.approx([20, float("nan"), 19], nan_ok=True)


def test_same_bits_for_every_number_of_threads():
    x, weight, grad = (
        random((300, 700), torch.float32, 0),
        random((700,), torch.float32, 1),
        random((300, 700), torch.float32, 2),
    )
    columns = torch.arange(300)

    def all_results():
        _, rstd = OPS.rms_norm(x, weight, EPS)
        logits = x.clone()
        statistics = OPS.cross_entropy(logits, columns, 700)
        OPS.cross_entropy_backward_(logits, columns, statistics[0], 1 / statistics[1], statistics[1], 700)
        half = grad[:, :350].contiguous()
        return [
            *OPS.rms_norm_backward(grad, x, weight, rstd),
            OPS.swiglu(x),
            OPS.swiglu_backward(half, x),
            logits,
        ]

    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(all_results())
    finally:
        torch.set_num_threads(threads)
    for first, other in itertools.product(results[:1], results[1:]):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_strided_inputs_and_more_dimensions():
    x, weight = random((5, 3, 48), torch.float32, 0), random((48,), torch.float32, 1)
    turned = x.transpose(0, 1)
    assert torch.equal(rms_norm(turned, weight, EPS), rms_norm(turned.contiguous(), weight, EPS))
    assert torch.equal(swiglu(turned), swiglu(turned.contiguous()))
    assert_near(rms_norm(x, weight, EPS), reference_norm(x.double(), weight.double()), 2e-6)
    columns = torch.tensor([1, 2, 3])
    assert torch.equal(
        softmax_statistics(x[0].T.contiguous().T, columns, 48), softmax_statistics(x[0], columns, 48)
    )


def test_float64_and_nothing_go_to_torch():
    x, weight = random((4, 6), torch.float64, 0), random((6,), torch.float64, 1)
    torch.testing.assert_close(rms_norm(x, weight, EPS), reference_norm(x, weight))
    torch.testing.assert_close(swiglu(x), reference_swiglu(x))
    assert rms_norm(x[:0].float(), weight.float(), EPS).shape == (0, 6)
    assert swiglu(x[:0].float()).shape == (0, 3)
    assert softmax_statistics(x[:0].float(), torch.zeros(0, dtype=torch.int64), 6).shape == (3, 0)


def test_opcheck():
    x, weight = random((3, 10), torch.float32, 0), random((10,), torch.float32, 1)
    check = torch.library.opcheck
    _, rstd = OPS.rms_norm(x, weight, EPS)
    check(OPS.rms_norm_backward, (x, x, weight, rstd))
    check(OPS.swiglu_backward, (x[:, :5].contiguous(), x))
    columns, ones = torch.tensor([0, 1, 9]), torch.ones(3)
    check(OPS.cross_entropy, (x, columns, 9))
    check(OPS.cross_entropy_backward_, (x.clone(), columns, ones, ones, ones, 9))
    check(OPS.rms_norm, (x.requires_grad_(), weight.requires_grad_(), EPS))
    check(OPS.swiglu, (x,))


def test_compiles_without_a_graph_break():
    x, weight = random((3, 10), torch.float32, 0).requires_grad_(), random((10,), torch.float32, 1)

    def function(x):
        return swiglu(rms_norm(x, weight, EPS)).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(function(x), x)[0])


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_a_second_derivative_is_refused(name):
    x, weight = random((3, 10), torch.float32, 0).requires_grad_(), random((10,), torch.float32, 1)
    out = rms_norm(x, weight, EPS) if name == "rms_norm" else swiglu(x)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} can be differentiated once"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overwritten_logits_are_not_taken_for_logits(dtype):
    weight = torch.ones(3, 10, dtype=dtype, requires_grad=True)
    logits = random((3, 10), dtype, 0)
    product = (weight * logits).sum()
    softmax_gradient_(logits, COLUMNS, STATISTIC, STATISTIC, STATISTIC, 10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


X, WEIGHT, COLUMNS, STATISTIC = (
    torch.zeros(3, 10),
    torch.ones(10),
    torch.zeros(3, dtype=torch.int64),
    torch.ones(3),
)
REFUSALS = {
    "weight has the shape": lambda: OPS.rms_norm(X, WEIGHT[:9], EPS),
    "weight has the wrong dtype": lambda: OPS.rms_norm(X, WEIGHT.half(), EPS),
    "rms_norm takes float32, bfloat16 or float16": lambda: OPS.rms_norm(X.double(), WEIGHT.double(), EPS),
    "grad has the shape": lambda: OPS.rms_norm_backward(X[:2], X, WEIGHT, STATISTIC),
    "rstd has the shape": lambda: OPS.rms_norm_backward(X, X, WEIGHT, STATISTIC[:2]),
    "an even width": lambda: OPS.swiglu(X[:, :9]),
    "which does not fit": lambda: OPS.swiglu_backward(X, X),
    "logits must be": lambda: OPS.cross_entropy(X[0], COLUMNS, 3),
    "num_real is 11": lambda: OPS.cross_entropy(X, COLUMNS, 11),
    "columns has the wrong dtype": lambda: OPS.cross_entropy(X, COLUMNS.int(), 10),
    "must be contiguous": lambda: OPS.cross_entropy_backward_(
        X[:, ::2], COLUMNS, STATISTIC, STATISTIC, STATISTIC, 5
    ),
    "a statistic has the wrong dtype": lambda: OPS.cross_entropy_backward_(
        X, COLUMNS, STATISTIC, STATISTIC.double(), STATISTIC, 10
    ),
    "is not one of: ": lambda: OPS.swiglu(X, "mmx"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_wrong_inputs_are_refused(message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        REFUSALS[message]()
