"""Packed attention against float64, on every instruction set of this processor, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.errors import UserError
from meditron_train.native import Rotation, operators, packed_attention
from meditron_train.native.attention import _requested
from meditron_train.native.problem import Problem
from tests.native.attention_reference import cumulative, example, relative_error

INSTRUCTION_SETS = operators.instruction_sets()
HEAD_SIZES = [64, 80, 96, 128, 256]


def gradient_like(case, seed=99):
    return torch.randn(case.q.shape, generator=torch.Generator().manual_seed(seed)).to(case.q.dtype)


def errors(case, **changes):
    """Relative errors of output, dq, dk, dv."""
    grad = gradient_like(case)
    got, want = case.call_with_gradients(grad, **changes), case.expected_with_gradients(grad)
    assert all(g.dtype == case.q.dtype for g in got)
    return [relative_error(g, w) for g, w in zip(got, want, strict=True)]


def run_on(case, instruction_set, grad):
    """Output, dq, dk, dv of one instruction set."""
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    problem = Problem(
        *inputs, torch.tensor(case.cu_q), torch.tensor(case.cu_k), scale, case.window, case.rotation, True
    )
    out = operators.attend(problem, instruction_set)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@st.composite
def examples(draw, largest=300):
    lengths = draw(st.lists(st.integers(0, largest), min_size=1, max_size=6))
    extra = draw(st.none() | st.lists(st.integers(0, 150), min_size=len(lengths), max_size=len(lengths)))
    rotated = draw(st.booleans())
    return example(
        lengths,
        draw(st.sampled_from([(4, 4), (4, 2), (6, 1)])),
        draw(st.sampled_from(HEAD_SIZES)),
        extra_keys=extra,
        window=draw(st.none() | st.integers(1, 400)),
        rotated=rotated,
        positions=rotated and draw(st.booleans()),
        scale=draw(st.none() | st.floats(0.01, 0.06)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(examples(), st.sampled_from(INSTRUCTION_SETS))
def test_equals_float64(case, instruction_set):
    grad = gradient_like(case)
    got, want = run_on(case, instruction_set, grad), case.expected_with_gradients(grad)
    output_error, *gradient_errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
    assert output_error < 1e-6
    assert max(gradient_errors) < 1e-5


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_half_precision_is_off_by_at_most_twice_what_pytorch_is(dtype, head_size, instruction_set):
    case = example([33, 130, 1, 0, 77], (4, 2), head_size, dtype=dtype, seed=head_size)
    grad = gradient_like(case)
    want = case.expected_with_gradients(grad)
    ours = [relative_error(g, w) for g, w in zip(run_on(case, instruction_set, grad), want, strict=True)]
    theirs = errors(case, backend="sdpa")
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_one_long_document():
    output_error, *gradient_errors = errors(example([1500], (2, 1), 128, rotated=True))
    assert output_error < 1e-6 and max(gradient_errors) < 1e-5


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype, window):
    """One thread takes the long document in parts of 633 queries, more take it in parts of 384."""
    case = example([2500, 30], (2, 2), 64, dtype=dtype, window=window)
    grad = gradient_like(case)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(case.call_with_gradients(grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_the_largest_window_is_none(backend):
    case = example([5, 0, 130], (4, 2), 64, extra_keys=[2, 3, 140])
    grad = gradient_like(case)
    want = case.call_with_gradients(grad, backend=backend)
    got = case.call_with_gradients(grad, backend=backend, window=2**63 - 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sdpa_equals_float64():
    case = example([5, 0, 30, 7], (4, 2), 64, extra_keys=[2, 3, 0, 1], window=9, rotated=True)
    assert max(errors(case, backend="sdpa")) < 1e-6
    aligned = example([5, 0, 30], (4, 2), 40)
    assert max(errors(aligned, backend="sdpa")) < 1e-6


@pytest.mark.parametrize("head_size", [24, 528])
def test_other_head_sizes_and_dtypes_fall_back(head_size):
    case = example([5, 9], (2, 2), head_size)
    assert max(errors(case)) < 1e-6
    with pytest.raises(UserError, match=f"head size {head_size} is not a multiple of 16 up to 512"):
        case.call(backend="native")
    with pytest.raises(ValueError, match="attention backend 'flash' is not one of auto, "):
        case.call(backend="flash")


def test_strided_inputs_need_no_copy():
    """q, k and v as slices of one projection, as megatron-core gives them."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(50, 8, 64, generator=generator)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    cu = torch.tensor([0, 20, 50])
    got = packed_attention(q, k, v, cu)
    torch.testing.assert_close(got, packed_attention(q.clone(), k.clone(), v.clone(), cu), rtol=0, atol=0)
    swapped = q.transpose(0, 2).contiguous().transpose(0, 2)  # channels are not dense
    torch.testing.assert_close(got, packed_attention(swapped, k, v, cu), rtol=0, atol=0)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("head_size, window", [(64, None), (128, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad"])
def test_nan_stays_in_its_document(poisoned, dtype, head_size, window, instruction_set):
    clean, dirty = (
        example([19, 140, 33], (2, 1), head_size, dtype=dtype, window=window, rotated=True) for _ in range(2)
    )
    grad, dirty_grad = gradient_like(clean), gradient_like(clean)
    (dirty_grad if poisoned == "grad" else getattr(dirty, poisoned))[19:159] = float("nan")
    want, got = run_on(clean, instruction_set, grad), run_on(dirty, instruction_set, dirty_grad)
    for w, g in zip(want, got, strict=True):
        assert torch.equal(w[:19], g[:19]) and torch.equal(w[159:], g[159:])
    assert got[1 if poisoned == "grad" else 0][19:159].isnan().all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_scores_far_apart(instruction_set):
    """No overflow where one key outweighs all others by e^1000."""
    case = example([200], (1, 1), 64, scale=100.0)
    grad = gradient_like(case)
    got, want = run_on(case, instruction_set, grad), case.expected_with_gradients(grad)
    assert relative_error(got[0], want[0]) < 1e-4
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("head_size", [64, 40])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths, head_size):
    case = example(lengths, (4, 2), head_size)
    out, *gradients = case.call_with_gradients(torch.zeros(0, 4, head_size))
    assert out.shape == (0, 4, head_size) and all(g.numel() == 0 for g in gradients)


@pytest.mark.parametrize("head_size", [64, 40])
def test_keys_alone_get_zero_gradient(head_size):
    case = example([0, 0], (4, 2), head_size, extra_keys=[5, 0], rotated=True)
    case.k[2] = torch.nan
    out, dq, dk, dv = case.call_with_gradients(torch.zeros(0, 4, head_size))
    assert out.shape == dq.shape == (0, 4, head_size)
    assert torch.equal(dk, torch.zeros_like(case.k)) and torch.equal(dv, torch.zeros_like(case.v))


def test_nonpositive_scales_go_to_pytorch_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [_requested("auto", gpu, scale) for scale in (-1.0, 0.0, 0.1)] == ["sdpa", "sdpa", "auto"]
    assert _requested("native", gpu, -1.0) == "native" and _requested("auto", cpu, -1.0) == "auto"
    case = example([30, 5], (4, 2), 64, scale=-0.1)
    assert max(errors(case)) < 1e-5


def test_rotation_tables_may_begin_at_any_float():
    case = example([30, 5], (4, 2), 64, rotated=True)
    tables = (case.rotation.cos_PC, case.rotation.sin_PC)
    moved = Rotation(*(torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape) for x in tables))
    assert torch.equal(case.call(rotation=moved), case.call())


def test_keys_without_queries_get_zero_gradient():
    case = example([0, 8], (2, 2), 64, extra_keys=[5, 0])
    _, _, dk, dv = case.call_with_gradients(gradient_like(case))
    assert not dk[:5].any() and not dv[:5].any() and dk[5:].any()
    assert max(errors(case)) < 1e-6


def test_gradcheck():
    """Against finite differences: float32, so a large step and a loose tolerance."""
    case = example([3, 5], (2, 1), 16, rotated=True, seed=5)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: packed_attention(q, k, v, torch.tensor(case.cu_q), rotation=case.rotation),
            inputs,
            eps=1e-2,
            atol=2e-3,
            rtol=1e-2,
        )


# ---------------------------------------------------------------------------------------------- torch's machinery


def operator_arguments(case, requires_grad=True):
    rotation = case.rotation
    return (
        *(x.detach().requires_grad_(requires_grad) for x in (case.q, case.k, case.v)),
        torch.tensor(case.cu_q),
        torch.tensor(case.cu_k),
        *((None,) * 4 if rotation is None else (rotation.cos_PC, rotation.sin_PC, None, None)),
        0.125,
        case.window or 0,
        None,
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_opcheck(rotated):
    case = example([3, 14], (4, 2), 64, rotated=rotated)
    torch.library.opcheck(torch.ops.meditron.packed_attention, operator_arguments(case))
    arguments = operator_arguments(case, requires_grad=False)
    out, lse = torch.ops.meditron.packed_attention(*arguments)
    torch.library.opcheck(
        torch.ops.meditron.packed_attention_backward, (torch.ones_like(out), out, lse, *arguments)
    )


def test_compiles_without_a_graph_break():
    case = example([3, 14], (4, 2), 64, rotated=True)
    cu = torch.tensor(case.cu_q)

    def function(q, k, v):
        return packed_attention(q, k, v, cu, rotation=case.rotation).square().sum()

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(function(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused():
    case = example([3, 14], (4, 2), 64)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    (dq,) = torch.autograd.grad(case.call().square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="packed_attention can be differentiated once"):
        dq.sum().backward()


def test_checkpointing_gives_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    case = example([40, 14], (4, 2), 64, rotated=True)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    cu = torch.tensor(case.cu_q)

    def function(q, k, v):
        return packed_attention(q, k, v, cu, rotation=case.rotation)

    want = torch.autograd.grad(function(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_lse_is_the_logarithm_of_the_sum():
    case = example([6, 70], (4, 2), 64)
    _, lse = torch.ops.meditron.packed_attention(*operator_arguments(case, requires_grad=False))
    scores = (
        torch.einsum("nd,snd->ns", case.q[75].double(), case.k[6:].double().repeat_interleave(2, 1)) * 0.125
    )
    torch.testing.assert_close(lse[:, 75].double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- refusals

BAD = {
    "starts late": (dict(cu=[1, 10]), "starts at 0"),
    "decreases": (dict(cu=[0, 6, 4, 10]), "decreases from 6 to 4"),
    "ends early": (dict(cu=[0, 9]), "ends at 9, but there are 10"),
    "heads": (dict(kv_heads=3), "4 query heads are not a multiple of 3"),
    "dtypes": (dict(k_dtype=torch.float64), "different dtypes"),
    "window": (dict(window=0), "window is 0"),
    "window of no number of keys": (dict(window=2.5), "window is 2.5; it is a number of keys"),
    "window beyond 64 bits": (dict(window=2**63), f"window is {2**63}"),
    "no channels": (dict(head_size=0), r"the heads have no channels: q is \(10, 4, 0\)"),
    "more queries than keys": (
        dict(cu_kv=[0, 4, 10], cu=[0, 5, 10]),
        "document 0 has 5 queries but only 4 keys",
    ),
    "unpaired": (dict(cu_kv=[0, 4, 10]), "1 documents and cu_seqlens_kv 2"),
    "short tables": (dict(rotation=(9, 32)), "9 rows for 10 tokens: give q_positions"),
    "wide tables": (dict(rotation=(10, 64)), r"\[positions, 32\] for heads of 64"),
    "flat tables": (dict(rotation=(320,)), r"\[positions, 32\] for heads of 64; got \(320,\)"),
    "tables elsewhere": (dict(rotation=(10, 32), tables_on="meta"), "cos_PC is on meta, but q is on cpu"),
    "negative position": (dict(rotation=(10, 32), position=-1), r"q_positions\[3\] is -1, but .* 10 rows"),
    "position beyond": (dict(rotation=(10, 32), position=10), r"q_positions\[3\] is 10, but .* 10 rows"),
    "floating boundaries": (dict(cu=[0.0, 10.0]), "cu_seqlens must be int32 or int64, not torch.float32"),
    "floating boundaries of keys": (dict(cu_kv=[0.0, 10.0]), "cu_seqlens_kv must be int32 or int64"),
}


@pytest.mark.parametrize("backend", ["native", "sdpa"])
@pytest.mark.parametrize("case", BAD)
def test_refuses(case, backend):
    change, message = BAD[case]
    head_size = change.get("head_size", 64)
    q, k, v = torch.zeros(10, 4, head_size), *torch.zeros(2, 10, change.get("kv_heads", 2), head_size)
    k = k.to(change.get("k_dtype", k.dtype))
    cu_kv, rotation = change.get("cu_kv"), None
    if "rotation" in change:
        tables = torch.zeros(2, *change["rotation"], device=change.get("tables_on", "cpu"))
        positions = None
        if "position" in change:
            positions = torch.arange(10)
            positions[3] = change["position"]
        rotation = Rotation(*tables, positions)
    with pytest.raises(ValueError, match=message):
        packed_attention(
            q,
            k,
            v,
            torch.tensor(change.get("cu", [0, 10])),
            cu_seqlens_kv=None if cu_kv is None else torch.tensor(cu_kv),
            window=change.get("window"),
            rotation=rotation,
            backend=backend,
        )


OPERATOR_BAD = {
    "boundaries": (3, torch.tensor([0, 99]), "cu_seqlens ends at 99, but there are 17"),
    "key boundaries": (4, torch.tensor([0, 5, 3, 17]), "cu_seqlens_kv decreases from 5 to 3"),
    "start": (3, torch.tensor([2, 17]), "must start at 0, not at 2"),
    "kind": (3, torch.tensor([0.0, 17.0]), "must be int32 or int64"),
    "shape": (1, torch.zeros(17, 2, 32), r"k has the shape \[17, 2, 32\]"),
    "positions": (7, torch.full((17,), 17), r"q_positions\[0\] is 17, but cos and sin have 17 rows"),
    "negative position": (8, torch.full((17,), -1), r"k_positions\[0\] is -1"),
    "instruction set": (11, "avx1024", "instruction set 'avx1024' is not one of: "),
    "window": (10, -1, "window is -1"),
}


@pytest.mark.parametrize("case", OPERATOR_BAD)
def test_the_operator_checks_for_itself(case):
    """It must never read outside, whoever calls it."""
    place, value, message = OPERATOR_BAD[case]
    arguments = list(operator_arguments(example([3, 14], (4, 2), 64, rotated=True), requires_grad=False))
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.meditron.packed_attention(*arguments)


def test_boundaries_as_int32_and_int64():
    case = example([3, 14], (4, 2), 64)
    want = case.call()
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor(cumulative([3, 14]), dtype=dtype)
        assert torch.equal(case.call(cu_seqlens_kv=cu), want)
