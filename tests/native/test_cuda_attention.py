"""The CUDA kernels of packed attention, run by the emulator, against float64.

Legend: T query tokens, S key/value tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from tests.native.emulated import Emulator, compiler
from tests.native.reference import Packing, attention, bounds, random_packing, row_errors

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]

HEAD_DIMS = (64, 80, 96, 128, 256)
# Relative error of a row: inputs, weights and results are rounded to the dtype once each, rotated q and k once more.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# dq and dk also bear the rounding of out, in differences that may cancel.
TOLERANCES_OF_DIFFERENCES = {torch.bfloat16: 2.5e-2, torch.float16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["bf16", "fp16"])
SENTINEL = 77.0


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator()


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor


@dataclass
class Results:
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor

    def items(self):
        return vars(self).items()


def padded(tokens: int, heads: int, dim: int, dtype: torch.dtype, fill: float) -> torch.Tensor:
    """A view [tokens, heads, dim] of a larger tensor full of `fill`, with room between tokens and around."""
    return torch.full((tokens + 2, heads + 3, dim), fill, dtype=dtype)[1:-1, 1:-2]


def surroundings(view: torch.Tensor) -> torch.Tensor:
    """What `padded` put around the view."""
    whole = view._base.clone()
    whole[1:-1, 1:-2] = SENTINEL
    return whole


def random_inputs(
    packing: Packing, heads: tuple[int, int], dim: int, dtype: torch.dtype, seed: int
) -> Inputs:
    """Values of the dtype, in the middle of NaN."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for tokens, count in (
        (packing.cu_queries[-1], heads[0]),
        (packing.cu_keys[-1], heads[1]),
        (packing.cu_keys[-1], heads[1]),
        (packing.cu_queries[-1], heads[0]),
    ):
        view = padded(tokens, count, dim, dtype, torch.nan)
        view.copy_(torch.randn(view.shape, generator=generator))
        tensors.append(view)
    return Inputs(*tensors)


def run(emulator: Emulator, inputs: Inputs, packing: Packing) -> Results:
    """Every output starts as NaN; what lies around it must stay as it was."""
    q, k, v = inputs.q, inputs.k, inputs.v
    out, dq, dk, dv = (padded(*x.shape, x.dtype, SENTINEL) for x in (q, q, k, v))
    for view in (out, dq, dk, dv):
        view.fill_(torch.nan)
    lse = emulator.forward(q, k, v, out, packing)
    emulator.backward((q, k, v, out, inputs.grad_out), lse, (dq, dk, dv), packing)
    for view in (out, dq, dk, dv):
        assert (surroundings(view) == SENTINEL).all(), "something was written outside of a tensor"
    return Results(out, lse, dq, dk, dv)


def exact(inputs: Inputs, packing: Packing) -> Results:
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = attention(q, k, v, packing)
    grads = torch.autograd.grad(out, (q, k, v), inputs.grad_out.double(), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), grads, strict=True)]
    return Results(out.detach(), lse.detach(), *filled)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def equal_bits(a: Results, b: Results) -> bool:
    return all(torch.equal(bits(x), bits(y)) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", HEAD_DIMS)
@DTYPES
def test_equals_float64(emulator, dtype, dim, seed):
    draw = random.Random(f"{dtype}{dim}{seed}")
    packing = random_packing(draw, dim)
    heads = draw.choice([(1, 1), (2, 2), (3, 1), (4, 2)])
    emulator.configure(seed=seed, deferred=draw.random() < 0.5)
    inputs = random_inputs(packing, heads, dim, dtype, seed)
    expected = exact(inputs, packing)
    results = run(emulator, inputs, packing)
    for (name, result), (_, wanted) in zip(results.items(), expected.items(), strict=True):
        if name == "lse":
            # In fp32, but for the rounding of rotated q and k.
            allowed = 2e-6 if packing.cos is None else TOLERANCES[dtype]
            error = ((result - wanted).abs() / (1 + wanted.abs())).nan_to_num(torch.inf)
            assert error.le(allowed).all(), (name, packing)
        else:
            error = row_errors(result, wanted)
            tolerances = TOLERANCES_OF_DIFFERENCES if name in ("dq", "dk") else TOLERANCES
            assert error <= tolerances[dtype], f"{name} is off by {error:.1e} of a row for {packing}"


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_no_bank_conflicts_in_fragment_loads(emulator, dim):
    packing = Packing(bounds([70]), bounds([70]))
    emulator.configure()
    before = emulator.bank_conflicts()
    run(emulator, random_inputs(packing, (1, 1), dim, torch.bfloat16, 0), packing)
    assert emulator.bank_conflicts() == before


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_nan_stays_in_its_document(emulator, dim):
    packing = Packing(bounds([70, 33, 90]), bounds([70, 50, 90]), 40)
    inputs = random_inputs(packing, (2, 1), dim, torch.bfloat16, 0)
    emulator.configure(seed=1)
    clean = run(emulator, inputs, packing)
    for tensor, cu in (
        (inputs.q, packing.cu_queries),
        (inputs.grad_out, packing.cu_queries),
        (inputs.k, packing.cu_keys),
        (inputs.v, packing.cu_keys),
    ):
        tensor[cu[1] : cu[2]] = torch.nan
    poisoned = run(emulator, inputs, packing)
    for name, before in clean.items():
        after = getattr(poisoned, name)
        cu = packing.cu_keys if name in ("dk", "dv") else packing.cu_queries
        before, after = (x.T[:, :, None] if name == "lse" else x for x in (before, after))
        assert after[cu[1] : cu[2]].isnan().all()
        for part in (slice(0, cu[1]), slice(cu[2], None)):
            assert torch.equal(before[part], after[part]), f"{name} of another document changed"


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_runs_are_equal_to_the_bit(emulator, dim):
    packing = Packing(bounds([150, 0, 40]), bounds([200, 3, 40]))
    inputs = random_inputs(packing, (4, 2), dim, torch.bfloat16, 0)
    runs = []
    for seed, deferred in ((0, False), (1, False), (2, True), (3, True)):
        emulator.configure(seed=seed, deferred=deferred)
        runs.append(run(emulator, inputs, packing))
    assert all(equal_bits(runs[0], other) for other in runs[1:])


def test_documents_do_not_depend_on_their_neighbors(emulator):
    alone = Packing(bounds([100]), bounds([130]), 50)
    among = Packing(bounds([61, 100, 7]), bounds([61, 130, 9]), 50)
    inputs = random_inputs(among, (2, 1), 64, torch.float16, 0)
    emulator.configure()
    everything = run(emulator, inputs, among)
    queries, keys = slice(61, 161), slice(61, 191)
    part = Inputs(inputs.q[queries], inputs.k[keys], inputs.v[keys], inputs.grad_out[queries])
    single = run(emulator, part, alone)
    assert torch.equal(single.out, everything.out[queries])
    assert torch.equal(single.dq, everything.dq[queries])
    assert torch.equal(single.dk, everything.dk[keys])
    assert torch.equal(single.dv, everything.dv[keys])


def test_no_tokens(emulator):
    emulator.configure()
    for lengths in ([], [0], [0, 0, 0]):
        packing = Packing(bounds(lengths), bounds(lengths))
        results = run(emulator, random_inputs(packing, (2, 1), 64, torch.bfloat16, 0), packing)
        assert all(x.numel() == 0 for _, x in results.items())


def test_keys_that_nobody_sees_have_gradient_zero(emulator):
    emulator.configure(deferred=True)
    # No queries at all in the first document; in the second, a window that leaves out the first 130 keys.
    packing = Packing(bounds([0, 3]), bounds([70, 140]), 8)
    results = run(emulator, random_inputs(packing, (2, 2), 128, torch.bfloat16, 0), packing)
    assert not results.dk[:200].any() and not results.dv[:200].any()
    assert results.dv[200:].any(dim=-1).all()


def test_larger_scores_than_exp_can_take(emulator):
    emulator.configure()
    packing = Packing(bounds([90]), bounds([90]), softmax_scale=30.0)
    inputs = random_inputs(packing, (1, 1), 64, torch.float16, 0)
    results, expected = run(emulator, inputs, packing), exact(inputs, packing)
    assert row_errors(results.out, expected.out) <= TOLERANCES[torch.float16]
    assert all(x.isfinite().all() for _, x in results.items())


REFUSED = {
    "bf16 and fp16 only": dict(dtype=torch.float32),
    "head sizes": dict(dim=72),
    "positive softmax_scale": dict(softmax_scale=-1.0),
    "rotation tables must be aligned": dict(cos=torch.ones(81)[1:].view(2, 40)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_says_what_it_does_not_take(emulator, message):
    case = dict(REFUSED[message])
    dtype, dim = case.pop("dtype", torch.bfloat16), case.pop("dim", 80)
    packing = replace(Packing((0, 2), (0, 2)), **case)
    if packing.cos is not None:
        packing = replace(packing, sin=packing.cos)
    x = torch.zeros(2, 1, dim, dtype=dtype)
    assert message in (emulator.unsupported(x, x, packing) or "")
    with pytest.raises(RuntimeError, match=message):
        emulator.forward(x, x, x, x.clone(), packing)


def test_reading_outside_of_a_tensor_is_an_error(emulator):
    emulator.configure()
    x = torch.zeros(70, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="outside of every tensor"):
        emulator.forward(x, x, x, torch.zeros_like(x), Packing((0, 70), (0, 90)))


def test_misaligned_tensors_are_refused(emulator):
    x = torch.zeros(2 * 64 + 1, dtype=torch.bfloat16)
    aligned, shifted = x[:-1].view(2, 1, 64), x[1:].view(2, 1, 64)
    packing = Packing((0, 2), (0, 2))
    assert emulator.unsupported(aligned, aligned, packing) is None
    for tensors in ((shifted, aligned, aligned), (aligned, aligned, shifted)):
        with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
            emulator.forward(*tensors, torch.zeros_like(aligned), packing)
