"""Packed attention on a GPU against softmax attention in float64 on the CPU, forward and backward.

Every run draws new inputs; a failure names the seed.

Legend: T packed query tokens, S packed key tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.gpu.devices import CPU, CUDA, num_not_finite
from tests.native.reference import Packing, attention, bounds, random_packing, row_errors

HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS = [(4, 4), (8, 2), (4, 1)]
# Relative error of a row of the output and dv; dq and dk also bear the rounding of the output, in differences.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
TOLERANCES_OF_DIFFERENCES = {torch.float32: 2e-4, torch.bfloat16: 8e-2, torch.float16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
    """What is tested, the only call of it here: the product's packed attention on the device of q."""
    from meditron_train.native import Rotation, packed_attention

    rotation = None
    if packing.cos is not None:
        rotation = Rotation(packing.cos, packing.sin, packing.q_positions, packing.k_positions)
    return packed_attention(
        q,
        k,
        v,
        torch.tensor(packing.cu_queries, dtype=torch.int32),
        rotation=rotation,
        cu_seqlens_kv=torch.tensor(packing.cu_keys, dtype=torch.int32),
        softmax_scale=packing.softmax_scale,
        window=packing.window or None,
    )


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().getrandbits(32)


def draw_inputs(packing, heads, dim, dtype, seed) -> dict[str, torch.Tensor]:
    """q, k, v and the gradient of the output, with values of the dtype, so that both sides start from the same."""
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_keys = packing.cu_queries[-1], packing.cu_keys[-1]
    shapes = {
        "q": (num_queries, heads[0], dim),
        "k": (num_keys, heads[1], dim),
        "v": (num_keys, heads[1], dim),
        "output_grad": (num_queries, heads[0], dim),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def on_device(packing: Packing, device: str) -> Packing:
    names = ("cos", "sin", "q_positions", "k_positions")
    tables = {name: getattr(packing, name) for name in names}
    return replace(packing, **{name: x if x is None else x.to(device) for name, x in tables.items()})


def run(inputs: dict[str, torch.Tensor], packing: Packing, device: str) -> dict[str, torch.Tensor]:
    """Output and gradients on the CPU. Memory that the allocator may hand out for them is full of NaN before."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    packing = on_device(packing, device)
    tensors = [inputs[name].to(device, copy=True).requires_grad_() for name in ("q", "k", "v")]
    output_grad = inputs["output_grad"].to(device)
    poison = [torch.full_like(x, torch.nan) for x in (*tensors, output_grad) for _ in range(3)]
    poison += [torch.full((x.shape[1], x.shape[0]), torch.nan, device=device) for x in tensors]
    del poison
    output = attend(*tensors, packing)
    assert output.dtype == inputs["q"].dtype and output.device.type == device
    grads = torch.autograd.grad(output, tensors, output_grad)
    results = zip(("output", "dq", "dk", "dv"), (output.detach(), *grads), strict=True)
    return {name: result.cpu() for name, result in results}


def check_against_float64(packing, heads, dim, dtype, device, seed) -> None:
    inputs = draw_inputs(packing, heads, dim, dtype, seed)
    exact = [inputs[name].double().requires_grad_() for name in ("q", "k", "v")]
    expected, _ = attention(*exact, packing)
    expected_grads = torch.autograd.grad(expected, exact, inputs["output_grad"].double())
    results = run(inputs, packing, device)
    assert num_not_finite(results) == {}, f"seed {seed}"
    for (name, result), wanted in zip(results.items(), (expected.detach(), *expected_grads), strict=True):
        tolerances = TOLERANCES_OF_DIFFERENCES if name in ("dq", "dk") else TOLERANCES
        error = row_errors(result, wanted)
        assert error <= tolerances[dtype], (
            f"{name} is off by {error:.1e} of a row with seed {seed}, {packing}"
        )


@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@DTYPES
@DEVICES
def test_equals_float64_softmax(device, dtype, dim, heads, seed):
    packing = random_packing(random.Random(seed), dim)
    if packing.cu_queries[-1] == 0:
        packing = Packing((0, 17), (0, 17))
    check_against_float64(packing, heads, dim, dtype, device, seed)


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_documents(device, dim, window, seed):
    packing = Packing(bounds([1, 2100, 0, 777]), bounds([1, 2500, 0, 777]), window)
    check_against_float64(packing, (4, 2), dim, torch.bfloat16, device, seed)


@pytest.mark.parametrize("dim", [64, 128])
@DEVICES
def test_every_multiprocessor_takes_many_tiles(device, dim, seed):
    """Blocks of the kernels for H100 stay on their multiprocessor: eight turns and more reuse their buffers."""
    on_gpu, heads = device == "cuda", (8, 2)
    num_multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 3
    draw = random.Random(seed)
    lengths = [8192 if on_gpu else 300, *(draw.randint(1, 100) for _ in range(4 * num_multiprocessors))]
    assert heads[1] * sum(-(-length // 128) for length in lengths) > 8 * num_multiprocessors
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(sum(lengths), dim // 2, generator=generator)
    packing = Packing(bounds(lengths), bounds(lengths), cos=angles.cos(), sin=angles.sin())
    inputs = draw_inputs(packing, heads, dim, torch.bfloat16, seed)
    results = run(inputs, packing, device)
    assert num_not_finite(results) == {}, f"seed {seed}"
    # In float64 on the CPU this would take minutes.
    expected = by_pytorch_in_fp32(inputs, packing, device)
    for name, result in results.items():
        tolerances = TOLERANCES_OF_DIFFERENCES if name in ("dq", "dk") else TOLERANCES
        error = row_errors(result, expected[name].double())
        assert error <= tolerances[torch.bfloat16], f"{name} is off by {error:.1e} of a row with seed {seed}"


def by_pytorch_in_fp32(inputs, packing: Packing, device: str) -> dict[str, torch.Tensor]:
    from meditron_train.native import Rotation, packed_attention

    tensors = [inputs[name].to(device, torch.float32).requires_grad_() for name in ("q", "k", "v")]
    output = packed_attention(
        *tensors,
        torch.tensor(packing.cu_queries, dtype=torch.int32),
        rotation=Rotation(packing.cos.to(device), packing.sin.to(device)),
        backend="sdpa",
    )
    grads = torch.autograd.grad(output, tensors, inputs["output_grad"].to(device, torch.float32))
    results = zip(("output", "dq", "dk", "dv"), (output.detach(), *grads), strict=True)
    return {name: result.cpu() for name, result in results}


@pytest.mark.parametrize("dim", HEAD_DIMS)
@DTYPES
@DEVICES
def test_runs_are_equal_to_the_bit(device, dtype, dim, seed):
    lengths = [300, 0, 17, 128, 200]
    packing = Packing(bounds(lengths), bounds(lengths))
    inputs = draw_inputs(packing, (8, 2), dim, dtype, seed)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(inputs, packing, device)
        for _ in range(1 if device == "cpu" else 10):
            again = run(inputs, packing, device)
            assert all(torch.equal(first[name], again[name]) for name in first), f"seed {seed}"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@DTYPES
@DEVICES
def test_nan_stays_in_its_document(device, dtype, dim, seed):
    packing = Packing(bounds([70, 33, 90]), bounds([70, 50, 90]), 40)
    inputs = draw_inputs(packing, (4, 2), dim, dtype, seed)
    clean = run(inputs, packing, device)
    for name, tensor in inputs.items():
        cu = packing.cu_keys if name in ("k", "v") else packing.cu_queries
        tensor[cu[1] : cu[2]] = torch.nan
    poisoned = run(inputs, packing, device)
    for name, before in clean.items():
        cu = packing.cu_keys if name in ("dk", "dv") else packing.cu_queries
        for part in (slice(0, cu[1]), slice(cu[2], None)):
            same = torch.equal(before[part], poisoned[name][part])
            assert same, f"{name} of another document changed with seed {seed}"
