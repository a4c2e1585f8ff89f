"""Attention over packed documents: each token sees its own document's past and nothing else.

Legend: T packed query tokens, S packed key/value tokens, N query heads, K key/value heads, D head size,
P rows of the rotation tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meditron_train.native.backends import BACKENDS, choose_backend
from meditron_train.native.devices import is_gpu
from meditron_train.native.problem import Problem, Rotation

__all__ = ["AttentionSpan", "Rotation", "packed_attention"]


@dataclass(frozen=True)
class AttentionSpan:
    """A run of consecutive local queries and the keys they may see.

    Without context parallelism one span covers the micro-batch. With it, a rank holds two chunks of the
    sequence and gathers all keys; each chunk is a span whose first document may have more keys than queries
    (its earlier part lives on other ranks).

    Attributes:
        query_start, query_end: range in the local queries.
        key_start, key_end: range in the (gathered) keys.
        cu_seqlens: int32 [documents+1] on CPU, cumulative query lengths, from 0 to query_end - query_start.
        cu_seqlens_kv: the same for keys.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    cu_seqlens: torch.Tensor
    cu_seqlens_kv: torch.Tensor


def packed_attention(
    q_TND: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_kv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    rotation: Rotation | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal self-attention inside each packed document; differentiable, once.

    Our kernels are blocked as in FlashAttention (Dao et al. 2022): nothing grows with the square of the length.

    Args:
        q_TND: queries [T, N, D], fp32, bf16 or fp16; any strides.
        k_SKD, v_SKD: keys and values [S, K, D] of the same dtype and device; N is a multiple of K
            (grouped-query attention, Ainslie et al. 2023), never expanded by the caller.
        cu_seqlens: int32 or int64 [documents+1] on the CPU; document i has queries cu_seqlens[i]:cu_seqlens[i+1].
            Starts at 0, does not decrease, ends at T. Empty documents are allowed.
        cu_seqlens_kv: the same for keys, where they differ. A document with more keys than queries has its
            queries at the end: query j of n sees keys 0 … m-n+j of its m.
        softmax_scale: default D ** -0.5.
        window: each query sees at most this many keys, its own included (sliding window); None sees all.
        rotation: rotary embedding of q and k, done on the way into the kernels; gradients are those of the
            unrotated q and k.
        deterministic: flash-attn's backward with the same bits each time; by default as
            torch.are_deterministic_algorithms_enabled(). Ours always is deterministic; the other backends do not ask.
        backend: "auto", or one of `meditron_train.native.backends.BACKENDS`.

    Returns:
        [T, N, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or boundaries that do not fit, with the values; or a backend that is
            asked for and cannot do this.
    """
    cu_seqlens_kv = cu_seqlens if cu_seqlens_kv is None else cu_seqlens_kv
    _check_tensors(q_TND, k_SKD, v_SKD, window)
    if (
        not torch.compiler.is_compiling()
    ):  # values cannot be looked at then; the operator itself checks them again
        _check_boundaries(cu_seqlens, cu_seqlens_kv, q_TND.shape[0], k_SKD.shape[0])
    if rotation is not None:
        rotation.check(q_TND, k_SKD)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    problem = Problem(
        q_TND,
        k_SKD,
        v_SKD,
        cu_seqlens,
        cu_seqlens_kv,
        q_TND.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale),
        window,
        rotation,
        deterministic,
    )
    request = _requested(backend, q_TND.device, problem.softmax_scale)
    chosen = choose_backend(request, q_TND.device, q_TND.dtype, q_TND.shape[2])
    if q_TND.shape[0] == 0:  # not every backend takes nothing; the sums of nothing keep k and v in the graph
        return q_TND + k_SKD[:0].sum() + v_SKD[:0].sum()
    return BACKENDS[chosen].attend(problem)


def _requested(backend: str, device: torch.device, softmax_scale: float) -> str:
    """Fused kernels for GPUs take the largest product for the largest score: true of positive scales only."""
    return "sdpa" if backend == "auto" and is_gpu(device) and not softmax_scale > 0 else backend


def _check_tensors(q_TND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, window: int | None) -> None:
    if q_TND.dim() != 3 or k_SKD.dim() != 3 or k_SKD.shape != v_SKD.shape or q_TND.shape[2] != k_SKD.shape[2]:
        raise ValueError(
            "packed_attention wants q [T, N, D] and k, v [S, K, D] with the same D; got "
            f"q {tuple(q_TND.shape)}, k {tuple(k_SKD.shape)}, v {tuple(v_SKD.shape)}"
        )
    if q_TND.shape[2] == 0:
        raise ValueError(f"the heads have no channels: q is {tuple(q_TND.shape)}")
    if k_SKD.shape[1] == 0 or q_TND.shape[1] % k_SKD.shape[1] != 0:
        raise ValueError(
            f"{q_TND.shape[1]} query heads are not a multiple of {k_SKD.shape[1]} key/value heads"
        )
    if not (q_TND.dtype == k_SKD.dtype == v_SKD.dtype):
        raise ValueError(f"q, k and v have different dtypes: {q_TND.dtype}, {k_SKD.dtype}, {v_SKD.dtype}")
    if not (q_TND.device == k_SKD.device == v_SKD.device):
        raise ValueError(
            f"q, k and v are on different devices: {q_TND.device}, {k_SKD.device}, {v_SKD.device}"
        )
    if window is not None and (not isinstance(window, int) or not 1 <= window < 2**63):
        raise ValueError(
            f"window is {window!r}; it is a number of keys with the query's own among them: an int from 1 to 2^63 - 1, "
            "or None for all"
        )


def _check_boundaries(
    cu_seqlens: torch.Tensor, cu_seqlens_kv: torch.Tensor, num_queries: int, num_keys: int
) -> None:
    query_lengths = _lengths(cu_seqlens, num_queries, "cu_seqlens")
    key_lengths = _lengths(cu_seqlens_kv, num_keys, "cu_seqlens_kv")
    if len(query_lengths) != len(key_lengths):
        raise ValueError(
            f"cu_seqlens has {len(query_lengths)} documents and cu_seqlens_kv {len(key_lengths)}; they pair up"
        )
    for document, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        if queries > keys:
            raise ValueError(f"document {document} has {queries} queries but only {keys} keys")


def _lengths(cu_seqlens: torch.Tensor, total: int, name: str) -> list[int]:
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"{name} is on {cu_seqlens.device}; keep it on the CPU, as reading it there would wait for the device"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, not {cu_seqlens.dtype}")
    bounds = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or not bounds or bounds[0] != 0:
        raise ValueError(f"{name} must be a 1-D tensor that starts at 0; got {bounds!r}")
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if any(length < 0 for length in lengths):
        where = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{name} decreases from {bounds[where]} to {bounds[where + 1]} at index {where + 1}")
    if bounds[-1] != total:
        raise ValueError(f"{name} ends at {bounds[-1]}, but there are {total} tokens")
    return lengths
