"""Proof that the emulator sees missing synchronization: every barrier and wait of the kernels is taken out in turn."""

from __future__ import annotations

import pytest
import torch

from tests.native.emulated import Emulator, compiler
from tests.native.reference import Packing, bounds
from tests.native.test_cuda_attention import Results, equal_bits, random_inputs, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# Enough blocks of keys and queries that every buffer is used again. The second shares keys between warps.
PROBLEMS = [(64, bounds([300])), (256, bounds([150]))]
ORDERS = [(0, False), (1, False), (2, False), (3, True), (4, True)]


@pytest.mark.long
def test_every_barrier_and_wait_is_missed():
    emulator = Emulator()
    work = []
    for dim, cu in PROBLEMS:
        angles = torch.rand(cu[-1], dim // 2, generator=torch.Generator().manual_seed(0))
        packing = Packing(cu, cu, cos=angles.cos(), sin=angles.sin())
        inputs = random_inputs(packing, (2, 1), dim, torch.bfloat16, 0)
        emulator.configure()
        work.append((inputs, packing, run(emulator, inputs, packing)))

    def is_missed(site) -> bool:
        for inputs, packing, expected in work:
            for seed, deferred in ORDERS:
                emulator.configure(seed=seed, deferred=deferred, removed=site)
                try:
                    results: Results | None = run(emulator, inputs, packing)
                except RuntimeError:
                    return True
                if not equal_bits(results, expected):
                    return True
        return False

    # The sites of sm_90a are those of test_cuda_sm90.py.
    sites = [site for site in emulator.sites() if not site.file.startswith("sm90")]
    assert {site.kind for site in sites} >= {"block_sync", "cp_async_wait", "warp_sync"}
    assert not is_missed(None), "results depend on the order of warps or on when copies happen"
    assert [site for site in sites if not is_missed(site)] == []
