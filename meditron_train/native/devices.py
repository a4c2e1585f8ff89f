"""Which devices are GPUs: those of CUDA, and the one that `plan --trace` pretends."""

from __future__ import annotations

import torch

PRETENDED_GPU = "pretended"
"""The device type of a GPU that has neither memory nor kernels; see `meditron_train.flows.trace`."""


def is_gpu(device: torch.device) -> bool:
    return device.type in ("cuda", PRETENDED_GPU)
