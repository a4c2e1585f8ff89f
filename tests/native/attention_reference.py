"""Random problems of packed attention and their results in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meditron_train.native import Rotation, packed_attention
from tests.native.reference import Packing, attention


@dataclass(repr=False)
class Example:
    """Inputs of one call; T queries, S keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_q: list[int]
    cu_k: list[int]
    rotation: Rotation | None = None
    window: int | None = None
    scale: float | None = None

    def __repr__(self) -> str:
        return (
            f"Example(q {list(self.q.shape)}, k {list(self.k.shape)}, {self.cu_q}, {self.cu_k}, window {self.window}, "
            f"scale {self.scale}, {'rotated' if self.rotation else 'not rotated'})"
        )

    def call(self, **changes) -> torch.Tensor:
        arguments = dict(
            cu_seqlens_kv=torch.tensor(self.cu_k),
            softmax_scale=self.scale,
            window=self.window,
            rotation=self.rotation,
        )
        return packed_attention(self.q, self.k, self.v, torch.tensor(self.cu_q), **{**arguments, **changes})

    def call_with_gradients(self, grad: torch.Tensor, **changes) -> list[torch.Tensor]:
        """Output, dq, dk, dv."""
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        example = Example(*inputs, self.cu_q, self.cu_k, self.rotation, self.window, self.scale)
        out = example.call(**changes)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def expected_with_gradients(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """The same in float64, of the inputs as they are stored."""
        inputs = [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v)]
        out = exact(self, *inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def cumulative(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]


def example(
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    *,
    extra_keys: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    rotated: bool = False,
    positions: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> Example:
    """Random q, k, v; with `rotated`, random angles, and with `positions`, random rows of a longer table."""
    generator = torch.Generator().manual_seed(seed)
    cu_q = cumulative(lengths)
    cu_k = (
        cu_q if extra_keys is None else cumulative([n + e for n, e in zip(lengths, extra_keys, strict=True)])
    )
    num_queries, num_keys = cu_q[-1], cu_k[-1]

    def random(tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(tokens, num_heads, dim, generator=generator).to(dtype)

    rotation = None
    if rotated:
        num_rows = max(1, num_keys) + (7 if positions else 0)
        angles = 6.3 * torch.rand(num_rows, dim // 2, generator=generator)
        rows = [None, None]
        if positions:
            rows = [torch.randint(0, num_rows, (n,), generator=generator) for n in (num_queries, num_keys)]
        rotation = Rotation(angles.cos(), angles.sin(), *rows)
    return Example(
        random(num_queries, heads[0]),
        random(num_keys, heads[1]),
        random(num_keys, heads[1]),
        cu_q,
        cu_k,
        rotation,
        window,
        scale,
    )


def exact(case: Example, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The output in the dtype of q (float64)."""
    turn = case.rotation
    packing = Packing(
        tuple(case.cu_q),
        tuple(case.cu_k),
        case.window or 0,
        case.scale,
        *(() if turn is None else (turn.cos_PC, turn.sin_PC, turn.q_positions_T, turn.k_positions_S)),
    )
    return attention(q, k, v, packing)[0]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of `want`; infinite where got is not finite, 0 for empty tensors.

    Gradients of documents of one token are exactly 0: numbers count as at least 0.1, their inputs being about 1.
    """
    if want.numel() == 0:
        return 0.0
    if not got.isfinite().all():
        return float("inf")
    return float((got.double() - want).norm() / want.norm().clamp_min(0.1 * want.numel() ** 0.5))
