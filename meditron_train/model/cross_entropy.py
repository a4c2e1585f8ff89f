"""Cross-entropy over a vocabulary that tensor parallelism splits, without a softmax or an fp32 copy of the logits.

The logits are the largest tensor of a step. The forward reads them once, in their own dtype; the backward reads them
once more and leaves the gradient in their place.

Legend: T local tokens, V vocabulary rows of this tensor-parallel rank (padding included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from meditron_train.native import softmax_gradient_, softmax_statistics


class VocabParallelCrossEntropy(torch.autograd.Function):
    """`apply(logits_TV, labels_T, num_real, group)` -> losses_T, fp32, in nats.

    The backward overwrites the logits with their gradient; another backward through them raises RuntimeError.

    Args:
        logits_TV: this rank's columns, fp32, bf16 or fp16 [T, V].
        labels_T: int64, in the whole vocabulary.
        num_real: columns of this rank that are no padding; the rest takes no probability and gets no gradient.
        group: tensor-parallel group.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, num_real: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        logits_TV = logits_TV.detach().contiguous()
        column_T = labels_T - group.rank() * logits_TV.shape[1]
        max_T, sum_T, label_T = softmax_statistics(logits_TV, column_T, num_real).unbind()
        if group.size() > 1:
            local_max_T = max_T.clone()
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
            both = torch.stack((sum_T * (local_max_T - max_T).exp_(), label_T))
            dist.all_reduce(both, group=group)
            sum_T, label_T = both.unbind()
        ctx.save_for_backward(logits_TV, column_T, max_T, sum_T)
        ctx.num_real = num_real
        return sum_T.log() + max_T - label_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_T,) = grads
        logits_TV, column_T, max_T, sum_T = ctx.saved_tensors
        softmax_gradient_(logits_TV, column_T, max_T, grad_T / sum_T, grad_T, ctx.num_real)
        return logits_TV, None, None, None
