"""The norm of all gradients without reading one number from the device for each parameter.

Where neither Transformer Engine nor apex is installed, megatron-core takes the norm of each gradient to the
host and back.
"""

from __future__ import annotations

from typing import Any

import torch


def l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """L2 norm of the tensors of the first list together, fp32 [1] on their device; bit for bit megatron-core's.

    The other arguments are those of apex's `multi_tensor_l2norm`, which megatron-core calls.
    """
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    return torch.norm(norms).reshape(1), None


def install() -> None:
    """Replace megatron-core's own fallback; a fused kernel that it has found stays."""
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
