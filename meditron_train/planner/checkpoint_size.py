"""Bytes of a checkpoint, to be known before it is written."""

from __future__ import annotations

from typing import Literal

from meditron_train.config.model_config import ModelConfig

BYTES_PER_PARAMETER = {"bf16": 2, "fp32": 4}
# The optimizer's fp32 copy of the weights and Adam's two moments.
OPTIMIZER_BYTES_PER_PARAMETER = 12


def checkpoint_bytes(model: ModelConfig, precision: Literal["bf16", "fp32"]) -> int:
    """Bytes of a training checkpoint's tensors: weights and optimizer state, vocabulary padding left out."""
    return model.num_parameters * (BYTES_PER_PARAMETER[precision] + OPTIMIZER_BYTES_PER_PARAMETER)
