"""Cross-entropy over a vocabulary that tensor parallelism splits, without a softmax or an fp32 copy of the logits.

The logits are the largest tensor of a step. The forward reads them once, in their own dtype; the backward reads them
once more and leaves the gradient in their place.

Legend: L packed tokens of this context-parallel rank, V vocabulary rows of this tensor-parallel rank (padding
included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from meditron_train.native import softmax_gradient_, softmax_statistics


def vocabulary_statistics(
    logits_LV: torch.Tensor, labels_L: torch.Tensor, num_real: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, sum of exp(logit - largest), logit of the label) of each token over the whole vocabulary: fp32
    [L] each, the same on every rank of the group.

    Args:
        logits_LV: this rank's columns, fp32, bf16 or fp16 [L, V].
        labels_L: int64, in the whole vocabulary.
        num_real: columns of this rank that are not padding.
        group: tensor-parallel group.
    """
    column_L = labels_L - group.rank() * logits_LV.shape[1]
    max_L, sum_L, label_L = softmax_statistics(logits_LV.contiguous(), column_L, num_real).unbind()
    if group.size() > 1:
        local_max_L = max_L.clone()
        dist.all_reduce(max_L, op=dist.ReduceOp.MAX, group=group)
        both = torch.stack((sum_L * (local_max_L - max_L).exp_(), label_L))
        dist.all_reduce(both, group=group)
        sum_L, label_L = both.unbind()
    return max_L, sum_L, label_L


def gather_vocabulary(logits_LV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The logits [L, V] of all ranks of the group side by side: [L, V of all]."""
    parts = [torch.empty_like(logits_LV, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, logits_LV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """`apply(logits_LV, labels_L, num_real, group)` -> losses_L, fp32, in nats.

    The backward pass overwrites the logits with their gradient.

    Args:
        logits_LV: this rank's columns, fp32, bf16 or fp16 [L, V].
        labels_L: int64, in the whole vocabulary.
        num_real: columns of this rank that are not padding; the rest takes no probability and gets no
            gradient.
        group: tensor-parallel group.

    Raises:
        RuntimeError: another backward pass goes through the overwritten logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_LV: torch.Tensor, labels_L: torch.Tensor, num_real: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        logits_LV = logits_LV.detach().contiguous()
        max_L, sum_L, label_L = vocabulary_statistics(logits_LV, labels_L, num_real, group)
        column_L = labels_L - group.rank() * logits_LV.shape[1]
        ctx.save_for_backward(logits_LV, column_L, max_L, sum_L)
        ctx.num_real = num_real
        return sum_L.log() + max_L - label_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_L,) = grads
        logits_LV, column_L, max_L, sum_L = ctx.saved_tensors
        softmax_gradient_(logits_LV, column_L, max_L, grad_L / sum_L, grad_L, ctx.num_real)
        return logits_LV, None, None, None
