"""Which devices the tests of this directory run on.

Each test takes its device as a parameter, so that the same code runs on a CPU where there is no GPU. Where there is
one, megatron-core uses it, and the CPU parameter is skipped.
"""

from __future__ import annotations

import pytest
import torch

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def needs_gpus(number: int) -> list[pytest.MarkDecorator]:
    """Marks of a test that wants that many GPUs."""
    if NUM_GPUS == 0:
        reason = "there is no GPU: torch.cuda.is_available() is false"
    else:
        reason = f"needs {number} GPUs, one a rank; torch sees {NUM_GPUS}"
    return [pytest.mark.gpu, pytest.mark.skipif(number > NUM_GPUS, reason=reason)]


CUDA = pytest.param("cuda", id="cuda", marks=needs_gpus(1))
CPU = pytest.param(
    "cpu",
    id="cpu",
    marks=pytest.mark.skipif(NUM_GPUS > 0, reason="torch sees a GPU, and megatron-core would use it"),
)
REHEARSED = [*CPU.marks, pytest.mark.long]
"""Marks of a CPU's turn that is long: the other tests say the same of a CPU, this one that the test works."""
REHEARSAL = pytest.param("cpu", id="cpu", marks=REHEARSED)

HEAD_DIM = 64
"""A head size that our attention takes on GPUs; the small models of tests/train have 8 and 16."""


def our_attention(device: str) -> dict[str, str]:
    """The `train` section with which our kernels attend to bf16 heads of HEAD_DIM; skips where they are not built."""
    from meditron_train.native import operators
    from meditron_train.native.backends import choose_backend

    if device == "cuda" and not operators.built_with_cuda():
        pytest.skip("our CUDA kernels are not built: on this GPU other attention would be tested")
    assert choose_backend("native", torch.device(device), torch.bfloat16, HEAD_DIM) == "native"
    return {"precision": "bf16", "attention": "native"}


def num_not_finite(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many NaN and infinite elements each tensor has; only tensors that have any."""
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return {name: count for name, count in counts.items() if count}
