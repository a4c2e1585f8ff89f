"""The kernels for Hopper (wgmma, warp specialisation, persistent blocks), run by the emulator, against float64.

Legend: T query tokens, S key/value tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.native.emulated import Emulator, compiler
from tests.native.reference import Packing, bounds, random_packing, row_errors
from tests.native.test_cuda_attention import (
    DTYPES,
    TOLERANCES,
    TOLERANCES_OF_DIFFERENCES,
    Inputs,
    equal_bits,
    exact,
    random_inputs,
    run,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]

HEAD_DIMS = pytest.mark.parametrize("dim", [64, 128])


@pytest.fixture(scope="module")
def hopper() -> Emulator:
    return Emulator(capability=9)


def check(emulator: Emulator, inputs: Inputs, packing: Packing) -> None:
    dtype = inputs.q.dtype
    results, expected = run(emulator, inputs, packing), exact(inputs, packing)
    for (name, result), (_, wanted) in zip(results.items(), expected.items(), strict=True):
        if name == "lse":
            allowed = 2e-6 if packing.cos is None else TOLERANCES[dtype]
            error = ((result - wanted).abs() / (1 + wanted.abs())).nan_to_num(torch.inf)
            assert error.le(allowed).all(), (name, packing)
        else:
            error = row_errors(result, wanted)
            tolerances = TOLERANCES_OF_DIFFERENCES if name in ("dq", "dk") else TOLERANCES
            assert error <= tolerances[dtype], f"{name} is off by {error:.1e} of a row for {packing}"


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
    run(hopper, some, packing)
    fence = next(site for site in hopper.sites() if site.kind == "fence_proxy_async")
    emulator = Emulator(capability)
    emulator.configure(removed=fence)
    results = run(emulator, random_inputs(packing, (1, 1), dim, torch.bfloat16, 0), packing)
    assert [x.isnan().any() for _, x in results.items()] == [is_used] * 5


@HEAD_DIMS
def test_nan_stays_in_its_document(hopper, dim):
    packing = Packing(bounds([70, 33, 90]), bounds([70, 50, 90]), 40)
    inputs = random_inputs(packing, (2, 1), dim, torch.bfloat16, 0)
    hopper.configure(seed=1)
    clean = run(hopper, inputs, packing)
    inputs.q[70:103] = inputs.grad_out[70:103] = torch.nan
    inputs.k[70:120] = inputs.v[70:120] = torch.nan
    poisoned = run(hopper, inputs, packing)
    for name, before in clean.items():
        after = getattr(poisoned, name)
        before, after = (x.T[:, :, None] if name == "lse" else x for x in (before, after))
        end = 120 if name in ("dk", "dv") else 103
        assert after[70:end].isnan().all()
        for part in (slice(0, 70), slice(end, None)):
            assert torch.equal(before[part], after[part]), f"{name} of another document changed"


@HEAD_DIMS
def test_runs_are_equal_to_the_bit(hopper, dim):
    packing = Packing(bounds([300, 0, 40]), bounds([350, 3, 40]))
    inputs = random_inputs(packing, (4, 2), dim, torch.bfloat16, 0)
    runs = []
    for seed, deferred in ((0, False), (1, False), (2, True), (3, True)):
        hopper.configure(seed=seed, deferred=deferred)
        runs.append(run(hopper, inputs, packing))
    assert all(equal_bits(runs[0], other) for other in runs[1:])


def test_no_tokens(hopper):
    hopper.configure()
    for lengths in ([], [0], [0, 0, 0]):
        packing = Packing(bounds(lengths), bounds(lengths))
        results = run(hopper, random_inputs(packing, (2, 1), 64, torch.bfloat16, 0), packing)
        assert all(x.numel() == 0 for _, x in results.items())


def test_keys_that_nobody_sees_have_gradient_zero(hopper):
    hopper.configure(deferred=True)
    packing = Packing(bounds([0, 3]), bounds([70, 140]), 8)
    results = run(hopper, random_inputs(packing, (2, 2), 128, torch.bfloat16, 0), packing)
    assert not results.dk[:200].any() and not results.dv[:200].any()
    assert results.dv[200:].any(dim=-1).all()


def test_every_wait_and_fence_is_missed(hopper):
    """Each wait and fence of the kernel, taken out alone, must show in the results of one of a few orders of warps.

    But for one: the emulator's copying warpgroup hands over the last v right after the last k, without a pause
    that lets others come between, so the last wait for v of the forward pass is not seen to be needed. It is.
    """
    cu = bounds([600])
    angles = torch.rand(cu[-1], 32, generator=torch.Generator().manual_seed(0))
    packing = Packing(cu, cu, cos=angles.cos(), sin=angles.sin())
    inputs = random_inputs(packing, (2, 1), 64, torch.bfloat16, 0)
    hopper.configure()
    expected = run(hopper, inputs, packing)

    def is_missed(site) -> bool:
        for seed, deferred in ((0, True), (1, True), (2, False), (3, False), (4, False)):
            hopper.configure(seed=seed, deferred=deferred, removed=site)
            try:
                if not equal_bits(run(hopper, inputs, packing), expected):
                    return True
            except RuntimeError:
                return True
        return False

    sites = [site for site in hopper.sites() if site.file.startswith("sm90")]
    kinds = {"barrier_wait", "fence_proxy_async", "wgmma_fence", "wgmma_wait", "cp_async_wait"}
    assert {site.kind for site in sites} >= kinds
    assert not is_missed(None), "results depend on the order of warps or on when products happen"
    not_missed = [site for site in sites if not is_missed(site)]
    last_wait_for_v = max(
        (site for site in sites if site.kind == "barrier_wait" and site.file == "sm90_forward.cuh"),
        key=lambda site: site.line,
    )
    assert not_missed in ([], [last_wait_for_v])
