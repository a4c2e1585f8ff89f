"""The feed-forward half of a Llama layer: megatron-core's MLP with a fused SwiGLU between its two matrices."""

from __future__ import annotations

from typing import Any

import torch

from meditron_train.mcore import MLP
from meditron_train.native import swiglu


class SwigluMLP(MLP):
    """megatron-core's parameters, tensor parallelism and checkpoint names; a forward for Llama alone: no biases."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, B, H] -> the same shape, and None for the bias that megatron-core's layer would add."""
        assert per_token_scale is None, "only mixtures of experts scale tokens"
        # gate | up, also within each tensor-parallel rank
        gate_and_up, _no_bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_and_up))
