"""torch.ops.meditron: the compiled operators, with what torch.compile and autograd need to know of them.

Legend: T packed query tokens, S packed key/value tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meditron_train.native.problem import Problem

_LIBRARY = Path(__file__).with_name("_operators.abi3.so")


def load() -> str | None:
    """Load the operators; the reason if that is impossible, else None."""
    if not _LIBRARY.is_file():
        return "the C++ operators are not built: run `pip install -e .` in the repository"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the C++ operators do not load: {error}"
    return None


LOAD_ERROR = load()
"""Why the operators are missing, or None."""


def instruction_sets() -> list[str]:
    """What the CPU kernels can use on this processor, best first: "avx512bf16" (bfloat16 products of attention; all
    else as avx512), "avx512", "avx2", "portable"."""
    return str(torch.ops.meditron.cpu_instruction_sets()).split()


def built_with_cuda() -> bool:
    """Whether the operators hold CUDA kernels."""
    return LOAD_ERROR is None and bool(torch.ops.meditron.built_with_cuda())


def attend(problem: Problem, instruction_set: str | None = None) -> torch.Tensor:
    """Packed attention by our kernels.

    Args:
        problem: queries, keys, values and documents.
        instruction_set: for tests and benchmarks.

    Returns:
        [T, N, D].
    """
    rotation = problem.rotation
    out_TND, _lse_NT = torch.ops.meditron.packed_attention(
        problem.q_TND,
        problem.k_SKD,
        problem.v_SKD,
        problem.cu_seqlens,
        problem.cu_seqlens_kv,
        rotation.cos_PC if rotation else None,
        rotation.sin_PC if rotation else None,
        rotation.q_positions_T if rotation else None,
        rotation.k_positions_S if rotation else None,
        problem.softmax_scale,
        problem.window or 0,
        instruction_set,
    )
    return out_TND


def _forward_shapes(q_TND: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_NT = q_TND.new_empty((q_TND.shape[1], q_TND.shape[0]), dtype=torch.float32)
    return q_TND.new_empty(q_TND.shape), lse_NT


def _backward_shapes(
    grad_TND: torch.Tensor,
    out_TND: torch.Tensor,
    lse_NT: torch.Tensor,
    q_TND: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q_TND.new_empty(q_TND.shape), k_SKD.new_empty(k_SKD.shape), v_SKD.new_empty(v_SKD.shape)


def differentiable_once(operator: str) -> None:
    """Make the gradient of `operator`'s gradient an error; autograd would silently take it for zero."""

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(f"{operator} can be differentiated once")

    torch.library.register_autograd(f"meditron::{operator}_backward", refuse)


_NUM_TENSORS = 9  # q, k, v, two boundaries, cos, sin, two positions


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:_NUM_TENSORS])
    ctx.settings = inputs[_NUM_TENSORS:]


def _backward(ctx: Any, grad_TND: torch.Tensor, _grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    out_TND, lse_NT, *inputs = ctx.saved_tensors
    grads = torch.ops.meditron.packed_attention_backward(grad_TND, out_TND, lse_NT, *inputs, *ctx.settings)
    return (*grads, *[None] * (_NUM_TENSORS - 3 + len(ctx.settings)))


if LOAD_ERROR is None:
    torch.library.register_fake("meditron::packed_attention", _forward_shapes)
    torch.library.register_fake("meditron::packed_attention_backward", _backward_shapes)
    torch.library.register_autograd("meditron::packed_attention", _backward, setup_context=_save_for_backward)
    differentiable_once("packed_attention")
