"""Attention written out in float64, and random problems to compare with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meditron_train.native import Rotation, packed_attention


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
    """Softmax attention document by document with a mask, in the dtype of q (float64)."""
    if case.rotation is not None:
        q = _turn(q, case.rotation, case.rotation.q_positions_T)
        k = _turn(k, case.rotation, case.rotation.k_positions_S)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[2] ** -0.5 if case.scale is None else case.scale
    outputs = [q[:0]]
    for d in range(len(case.cu_q) - 1):
        queries = slice(case.cu_q[d], case.cu_q[d + 1])
        keys = slice(case.cu_k[d], case.cu_k[d + 1])
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        last = torch.arange(num_keys - num_queries, num_keys)[:, None]
        place = torch.arange(num_keys)[None]
        allowed = place <= last
        if case.window is not None:
            allowed &= place > last - case.window
        scores = torch.einsum("qnd,knd->nqk", q[queries], k[keys]) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights, v[keys]))
    return torch.cat(outputs)


def _turn(x: torch.Tensor, rotation: Rotation, rows: torch.Tensor | None) -> torch.Tensor:
    rows = torch.arange(x.shape[0]) if rows is None else rows
    cos, sin = rotation.cos_PC.double()[rows, None], rotation.sin_PC.double()[rows, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of `want`; infinite where got is not finite, 0 for empty tensors.

    Gradients of documents of one token are exactly 0: numbers count as at least 0.1, their inputs being about 1.
    """
    if want.numel() == 0:
        return 0.0
    if not got.isfinite().all():
        return float("inf")
    return float((got.double() - want).norm() / want.norm().clamp_min(0.1 * want.numel() ** 0.5))
