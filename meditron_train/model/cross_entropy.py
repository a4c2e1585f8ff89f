"""Cross-entropy over a vocabulary that tensor parallelism splits, in as few passes over the logits as possible.

The logits are the largest tensor of a step, and on a CPU this loss is bound by memory: megatron-core's passes over them
one after the other take three times as long as these, which do all their work on a block of rows while it is in cache,
and leave the division by the sum to the backward's one pass.

Legend: T local tokens, V vocabulary rows of this tensor-parallel rank (padding included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_CPU_BLOCK_ROWS = 16  # 16 rows of 32,000 fp32 logits are 2 MB: a core's own cache


class VocabParallelCrossEntropy(torch.autograd.Function):
    """`apply(logits_TV, labels_T, num_real, group)` -> losses_T, fp32, in nats.

    Args:
        logits_TV: this rank's columns, fp32 or bf16 [T, V]. fp32 logits are overwritten.
        labels_T: int64, in the whole vocabulary.
        num_real: columns of this rank that are no padding; the rest takes no probability and gets no gradient.
        group: tensor-parallel group.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, num_real: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        exp_TV = logits_TV.detach().float()
        num_tokens, width = exp_TV.shape
        column_T = labels_T - group.rank() * width
        is_here_T = (column_T >= 0) & (column_T < num_real)
        column_T = column_T.clamp(0, max(num_real - 1, 0))
        max_T = exp_TV.new_full((num_tokens,), torch.finfo(torch.float32).min)
        sum_T = exp_TV.new_zeros(num_tokens)
        label_T = exp_TV.new_zeros(num_tokens)
        rows = _CPU_BLOCK_ROWS if exp_TV.device.type == "cpu" else max(num_tokens, 1)
        for start in range(0, num_tokens if num_real else 0, rows):
            block = slice(start, start + rows)
            real = exp_TV[block, :num_real]
            max_T[block] = real.amax(dim=1)
            label_T[block] = real.gather(1, column_T[block, None])[:, 0]
            real.sub_(max_T[block, None]).exp_()
            sum_T[block] = real.sum(dim=1)
        exp_TV[:, num_real:] = 0
        label_T.mul_(is_here_T)
        scale_T = torch.ones_like(sum_T)
        if group.size() > 1:
            local_max_T = max_T.clone()
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
            scale_T = (local_max_T - max_T).exp_()
            both = torch.stack((sum_T * scale_T, label_T))
            dist.all_reduce(both, group=group)
            sum_T, label_T = both.unbind()
        ctx.save_for_backward(exp_TV, scale_T / sum_T, column_T, is_here_T)
        ctx.dtype = logits_TV.dtype
        return sum_T.log() + max_T - label_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_T,) = grads
        exp_TV, probability_T, column_T, is_here_T = ctx.saved_tensors
        grad_TV = exp_TV.mul_((probability_T * grad_T)[:, None])
        grad_TV[torch.arange(len(grad_T), device=grad_TV.device), column_T] -= grad_T * is_here_T
        return grad_TV.to(ctx.dtype), None, None, None
