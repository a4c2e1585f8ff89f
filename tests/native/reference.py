"""Packed attention written out in float64, and random problems for it.

Legend: T query tokens, S key/value tokens, N query heads, K key/value heads, D head size, P rows of rotation tables.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class Packing:
    """Which queries and keys belong together, and what is done with them besides softmax attention."""

    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    window: int = 0
    """0: none."""
    softmax_scale: float | None = None
    cos: torch.Tensor | None = None
    """fp32 [P, D / 2], as sin."""
    sin: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    """int64 [T]; None: 0 ... T - 1."""
    k_positions: torch.Tensor | None = None
    """int64 [S]; None: 0 ... S - 1."""


def rotated(x_TND: torch.Tensor, packing: Packing, positions: torch.Tensor | None) -> torch.Tensor:
    """Rotary embedding in the half-rotation layout (Su et al., 2021), in the dtype of x."""
    if packing.cos is None or packing.sin is None:
        return x_TND
    rows = torch.arange(x_TND.shape[0]) if positions is None else positions
    cos, sin = (table[rows, None].to(x_TND) for table in (packing.cos, packing.sin))
    x, y = x_TND.chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


def attention(
    q_TND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, N, D] and log-sum-exp [N, T], document by document, in the dtype given."""
    q_TND = rotated(q_TND, packing, packing.q_positions)
    k_SKD = rotated(k_SKD, packing, packing.k_positions)
    group = q_TND.shape[1] // k_SKD.shape[1]
    k_SND, v_SND = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    scale = q_TND.shape[2] ** -0.5 if packing.softmax_scale is None else packing.softmax_scale
    outputs, sums = [q_TND[:0]], [q_TND.new_zeros(q_TND.shape[1], 0)]
    for queries, keys in zip(pairwise(packing.cu_queries), pairwise(packing.cu_keys), strict=True):
        q, k, v = q_TND[slice(*queries)], k_SND[slice(*keys)], v_SND[slice(*keys)]
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))[None]
        hidden = key > position
        if packing.window:
            hidden |= key <= position - packing.window
        scores = (torch.einsum("tnd,snd->nts", q, k) * scale).masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("nts,snd->tnd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def row_errors(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row (last dimension); NaN counts as infinite.

    Small rows, where terms of size 1 cancel, are measured by a third of the average row, and by 1 at least.
    """
    if expected.numel() == 0:
        return 0.0
    sizes = expected.norm(dim=-1)
    errors = (result.double() - expected).norm(dim=-1) / sizes.clamp(min=max(1.0, sizes.mean().item() / 3))
    return errors.nan_to_num(torch.inf).max().item()


def bounds(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def random_packing(draw: random.Random, head_dim: int) -> Packing:
    """Documents of 0 ... 260 tokens, sometimes at the edges of tiles, with or without everything else."""
    lengths = [draw.choice([0, 1, draw.randint(1, 40), draw.randint(1, 260), 64, 65, 128]) for _ in range(4)]
    # Keys without queries are what context parallelism leaves to a rank that holds other parts of the document.
    extra = [draw.choice([0, 0, draw.randint(0, 90)]) for _ in lengths]
    cu_queries, cu_keys = bounds(lengths), bounds([n + more for n, more in zip(lengths, extra, strict=True)])
    tables: dict[str, torch.Tensor] = {}
    if draw.random() < 0.6:
        generator = torch.Generator().manual_seed(draw.getrandbits(32))
        num_rows = max(cu_keys[-1], 1)
        angles = 6.3 * torch.rand(num_rows, head_dim // 2, generator=generator)
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        if draw.random() < 0.7:
            for name, count in (("q_positions", cu_queries[-1]), ("k_positions", cu_keys[-1])):
                tables[name] = torch.randint(num_rows, (count,), generator=generator)
    window = draw.choice([0, 0, 1, draw.randint(1, 70), draw.randint(60, 300)])
    return Packing(cu_queries, cu_keys, window, draw.choice([None, None, 0.5 * head_dim**-0.5]), **tables)
