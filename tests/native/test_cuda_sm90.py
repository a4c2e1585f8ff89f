"""The forward kernel for Hopper (wgmma, warp specialisation, persistent blocks), run by the emulator, against float64.

Legend: T query tokens, S key/value tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.native.emulated import Emulator, compiler
from tests.native.reference import Packing, attention, bounds, random_packing, row_errors
from tests.native.test_cuda_attention import (
    DTYPES,
    SENTINEL,
    TOLERANCES,
    Inputs,
    bits,
    exact,
    padded,
    random_inputs,
    run,
    surroundings,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

HEAD_DIMS = pytest.mark.parametrize("dim", [64, 128])


@pytest.fixture(scope="module")
def hopper() -> Emulator:
    return Emulator(capability=9)


def forward(emulator: Emulator, inputs: Inputs, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse; what lies around the output must stay as it was."""
    out = padded(*inputs.q.shape, inputs.q.dtype, SENTINEL)
    out.fill_(torch.nan)
    lse = emulator.forward(inputs.q, inputs.k, inputs.v, out, packing)
    assert (surroundings(out) == SENTINEL).all(), "something was written outside of the output"
    return out, lse


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def check(emulator: Emulator, inputs: Inputs, packing: Packing) -> None:
    out, lse = forward(emulator, inputs, packing)
    expected_out, expected_lse = attention(*(x.double() for x in (inputs.q, inputs.k, inputs.v)), packing)
    tolerance = TOLERANCES[inputs.q.dtype]
    assert row_errors(out, expected_out) <= tolerance, packing
    error = ((lse - expected_lse).abs() / (1 + expected_lse.abs())).nan_to_num(torch.inf)
    assert error.le(2e-6 if packing.cos is None else tolerance).all(), packing


@pytest.mark.parametrize("seed", range(4))
@HEAD_DIMS
@DTYPES
def test_equals_float64(hopper, dtype, dim, seed):
    draw = random.Random(f"{dtype}{dim}{seed}")
    packing = random_packing(draw, dim)
    heads = draw.choice([(1, 1), (2, 2), (3, 1), (4, 2)])
    hopper.configure(seed=seed, deferred=draw.random() < 0.5)
    check(hopper, random_inputs(packing, heads, dim, dtype, seed), packing)


@HEAD_DIMS
def test_many_blocks_of_keys_and_many_tiles_for_each_block_of_threads(hopper, dim):
    packing = Packing(bounds([700, 3, 150]), bounds([720, 3, 150]))
    hopper.configure(seed=5, deferred=True)
    check(hopper, random_inputs(packing, (2, 1), dim, torch.bfloat16, 0), packing)


@pytest.mark.parametrize(("capability", "dim", "is_used"), [(9, 64, True), (9, 80, False), (8, 128, False)])
def test_is_used_where_it_is_made_for(hopper, capability, dim, is_used):
    """Without its proxy fence the kernel reads NaN; results of other kernels do not depend on it."""
    packing = Packing(bounds([20]), bounds([20]))
    some = random_inputs(packing, (1, 1), 64, torch.bfloat16, 0)
    hopper.configure()
    forward(hopper, some, packing)
    fence = next(site for site in hopper.sites() if site.kind == "fence_proxy_async")
    emulator = Emulator(capability)
    emulator.configure(removed=fence)
    out, _ = forward(emulator, random_inputs(packing, (1, 1), dim, torch.bfloat16, 0), packing)
    assert out.isnan().any() == is_used


def test_backward_of_sm80_takes_its_results(hopper):
    packing = Packing(bounds([130, 40]), bounds([150, 40]))
    inputs = random_inputs(packing, (2, 1), 64, torch.float16, 0)
    hopper.configure()
    results, expected = run(hopper, inputs, packing), exact(inputs, packing)
    for (name, result), (_, wanted) in zip(results.items(), expected.items(), strict=True):
        assert name == "lse" or row_errors(result, wanted) <= 8e-3, name


@HEAD_DIMS
def test_nan_stays_in_its_document(hopper, dim):
    packing = Packing(bounds([70, 33, 90]), bounds([70, 50, 90]), 40)
    inputs = random_inputs(packing, (2, 1), dim, torch.bfloat16, 0)
    hopper.configure(seed=1)
    clean = forward(hopper, inputs, packing)
    inputs.q[70:103] = torch.nan
    inputs.k[70:120] = torch.nan
    inputs.v[70:120] = torch.nan
    poisoned = forward(hopper, inputs, packing)
    for before, after in ((clean[0], poisoned[0]), (clean[1].T, poisoned[1].T)):
        assert after[70:103].isnan().all()
        for part in (slice(0, 70), slice(103, None)):
            assert torch.equal(before[part], after[part]), "another document changed"


@HEAD_DIMS
def test_runs_are_equal_to_the_bit(hopper, dim):
    packing = Packing(bounds([300, 0, 40]), bounds([350, 3, 40]))
    inputs = random_inputs(packing, (4, 2), dim, torch.bfloat16, 0)
    runs = []
    for seed, deferred in ((0, False), (1, False), (2, True), (3, True)):
        hopper.configure(seed=seed, deferred=deferred)
        runs.append(forward(hopper, inputs, packing))
    assert all(equal(runs[0], other) for other in runs[1:])


def test_no_tokens(hopper):
    hopper.configure()
    for lengths in ([], [0], [0, 0, 0]):
        packing = Packing(bounds(lengths), bounds(lengths))
        out, lse = forward(hopper, random_inputs(packing, (2, 1), 64, torch.bfloat16, 0), packing)
        assert out.numel() == lse.numel() == 0


def test_every_wait_and_fence_is_missed(hopper):
    """Each wait and fence of the kernel, taken out alone, must show in the results of one of a few orders of warps."""
    cu = bounds([600])
    angles = torch.rand(cu[-1], 32, generator=torch.Generator().manual_seed(0))
    packing = Packing(cu, cu, cos=angles.cos(), sin=angles.sin())
    inputs = random_inputs(packing, (2, 1), 64, torch.bfloat16, 0)
    hopper.configure()
    expected = forward(hopper, inputs, packing)

    def is_missed(site) -> bool:
        for seed, deferred in ((0, True), (1, True), (2, False), (3, False), (4, False)):
            hopper.configure(seed=seed, deferred=deferred, removed=site)
            try:
                if not equal(forward(hopper, inputs, packing), expected):
                    return True
            except RuntimeError:
                return True
        return False

    sites = [site for site in hopper.sites() if site.file.startswith("sm90")]
    kinds = {"barrier_wait", "fence_proxy_async", "wgmma_fence", "wgmma_wait", "cp_async_wait"}
    assert {site.kind for site in sites} >= kinds
    assert not is_missed(None), "results depend on the order of warps or on when products happen"
    assert [site for site in sites if not is_missed(site)] == []
