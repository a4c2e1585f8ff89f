"""RMSNorm, SwiGLU and the cross-entropy's passes over the logits: our kernels on the CPU, torch's operators elsewhere.

Legend: H hidden size, F feed-forward size, T tokens, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from meditron_train.native.operators import LOAD_ERROR, differentiable_once

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}  # logits in fp32 at a time: a core's cache, and 64 MiB


def _has_kernel(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return (
        LOAD_ERROR is None
        and first.dtype in _DTYPES
        and first.numel() > 0
        and all(tensor.device.type == "cpu" and tensor.dtype == first.dtype for tensor in tensors)
    )


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension of x [..., H], in the dtype of x.

    Computed in fp32 and rounded once on the CPU. The gradient of the weight has one order of summation, whatever the
    number of threads.
    """
    if not _has_kernel(x, weight_H):
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    return torch.ops.meditron.rms_norm(x, weight_H, eps)[0]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up for x [..., 2F] with the gate in its first half; [..., F]. Only x is kept for the backward."""
    if not _has_kernel(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return torch.ops.meditron.swiglu(x)


def softmax_statistics(logits_TV: torch.Tensor, column_T: torch.Tensor, num_real: int) -> torch.Tensor:
    """What the cross-entropy needs to know of each token's first `num_real` logits, read once.

    Args:
        logits_TV: fp32, bf16 or fp16.
        column_T: int64, the label's column; any other number where it is not among them.

    Returns:
        fp32 [3, T]: the largest logit, the sum of exp(logit - largest), the label's logit (0 where it is not here).
        Without columns the largest is the lowest fp32 number and the sum 0.
    """
    if _has_kernel(logits_TV):
        return torch.ops.meditron.cross_entropy(logits_TV, column_T, num_real)
    statistics = logits_TV.new_zeros((3, len(logits_TV)), dtype=torch.float32)
    statistics[0] = torch.finfo(torch.float32).min
    here_T = (column_T >= 0) & (column_T < num_real)
    for rows in _blocks(logits_TV) if num_real else ():
        logits = logits_TV[rows, :num_real].float()
        statistics[0, rows] = largest = logits.amax(dim=1)
        at_label = logits.gather(1, column_T[rows, None].clamp(0, num_real - 1))[:, 0]
        statistics[2, rows] = torch.where(here_T[rows], at_label, 0.0)
        statistics[1, rows] = logits.sub(largest[:, None]).exp_().sum(dim=1)
    return statistics


def softmax_gradient_(
    logits_TV: torch.Tensor,
    column_T: torch.Tensor,
    largest_T: torch.Tensor,
    scale_T: torch.Tensor,
    grad_T: torch.Tensor,
    num_real: int,
) -> None:
    """Overwrite logits with exp(logit - largest) · scale, less grad at the label's column; 0 from `num_real`
    on.

    Args:
        logits_TV: contiguous.
        column_T: as above.
        largest_T, scale_T, grad_T: fp32.
        num_real: columns that are not padding.

    Raises:
        RuntimeError: from autograd, when a backward pass still needs the logits.
    """
    if _has_kernel(logits_TV):
        torch.ops.meditron.cross_entropy_backward_(logits_TV, column_T, largest_T, scale_T, grad_T, num_real)
        torch.autograd.graph.increment_version(logits_TV)  # torch's own operators do so themselves
        return
    here_T = (column_T >= 0) & (column_T < num_real)
    for rows in _blocks(logits_TV):
        real = logits_TV[rows, :num_real]
        softmax = real.float().sub_(largest_T[rows, None]).exp_().mul_(scale_T[rows, None])
        if num_real:
            less = torch.where(here_T[rows], -grad_T[rows], 0.0)
            softmax.scatter_add_(1, column_T[rows, None].clamp(0, num_real - 1), less[:, None])
        real.copy_(softmax)
    logits_TV[:, num_real:] = 0


def _blocks(logits_TV: torch.Tensor) -> Iterator[slice]:
    """Rows to take at a time, so that no fp32 copy of all logits is made."""
    num_tokens, width = logits_TV.shape
    rows = max(1, _BLOCK_ELEMENTS.get(logits_TV.device.type, 2**24) // max(width, 1))
    return (slice(start, start + rows) for start in range(0, num_tokens, rows))


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _eps, ctx.instruction_set = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_backward(ctx: Any, grad: torch.Tensor, _grad_rstd: torch.Tensor | None) -> tuple[Any, ...]:
    grads = torch.ops.meditron.rms_norm_backward(grad, *ctx.saved_tensors, ctx.instruction_set)
    return (*grads, None, None)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.instruction_set = inputs
    ctx.save_for_backward(x)


def _swiglu_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.meditron.swiglu_backward(grad, x, ctx.instruction_set), None


def _half_of(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _describe_operators() -> None:
    """Shapes for torch.compile and gradients for autograd."""

    def fake(name: str, function: Any) -> None:
        torch.library.register_fake(f"meditron::{name}", function)

    fp32 = torch.float32
    fake(
        "rms_norm", lambda x, w, *_: (x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=fp32))
    )
    fake("rms_norm_backward", lambda _grad, x, w, *_: (x.new_empty(x.shape), w.new_empty(w.shape)))
    fake("swiglu", _half_of)
    fake("swiglu_backward", lambda _grad, x, *_: x.new_empty(x.shape))
    fake("cross_entropy", lambda logits, *_: logits.new_empty((3, logits.shape[0]), dtype=fp32))
    fake("cross_entropy_backward_", lambda *_: None)
    torch.library.register_autograd("meditron::rms_norm", _norm_backward, setup_context=_save_norm)
    torch.library.register_autograd("meditron::swiglu", _swiglu_backward, setup_context=_save_swiglu)
    differentiable_once("rms_norm")
    differentiable_once("swiglu")


if LOAD_ERROR is None:
    _describe_operators()
