"""RMSNorm (Zhang & Sennrich 2019) with the constructor that megatron-core's layers use."""

from __future__ import annotations

from typing import Any

import torch

from meditron_train.mcore import TransformerConfig
from meditron_train.native import rms_norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) · weight over the last dimension, in the dtype of x.

    megatron-core's own local norm refuses sequence parallelism and stumbles over any package named apex.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees a part of the tokens: megatron-core then sums this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
