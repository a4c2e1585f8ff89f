"""Attention over packed documents: each token sees its own document's past and nothing else.

Legend: T packed query tokens, S packed key/value tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


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
) -> torch.Tensor:
    """Causal self-attention inside each packed document; differentiable.

    Args:
        q_TND: queries [T, N, D], fp32, bf16 or fp16.
        k_SKD, v_SKD: keys and values [S, K, D] of the same dtype and device; N is a multiple of K
            (grouped-query attention, Ainslie et al. 2023), never expanded by the caller.
        cu_seqlens: int32 or int64 [documents+1]; document i has queries cu_seqlens[i]:cu_seqlens[i+1]. Starts
            at 0, does not decrease, ends at T. Empty documents are allowed. Keep it on the CPU: reading it
            from a GPU waits for the device.
        cu_seqlens_kv: the same for keys, where they differ. A document with more keys than queries has its
            queries at the end: query j of n sees keys 0 … m-n+j of its m.
        softmax_scale: default D ** -0.5.
        window: each query sees at most this many keys, its own included (sliding window); None sees all.

    Returns:
        [T, N, D], dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or boundaries that do not fit, with the values.
    """
    if cu_seqlens_kv is None:
        cu_seqlens_kv = cu_seqlens
    query_lengths, key_lengths = _checked_lengths(q_TND, k_SKD, v_SKD, cu_seqlens, cu_seqlens_kv, window)
    if q_TND.shape[0] == 0:
        return torch.zeros_like(q_TND)
    outputs = [
        _attend_document(q, k, v, softmax_scale, window)
        # One split and one cat: slicing document by document makes the backward several times slower.
        for q, k, v in zip(
            q_TND.split(query_lengths), k_SKD.split(key_lengths), v_SKD.split(key_lengths), strict=True
        )
        if q.shape[0] > 0
    ]
    return torch.cat(outputs)


def _attend_document(
    q_TND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    num_queries, num_keys = q_TND.shape[0], k_SKD.shape[0]
    aligned = num_queries == num_keys and (window is None or window >= num_keys)
    mask = None if aligned else _causal_mask(num_queries, num_keys, window, q_TND.device)
    o_NTD = F.scaled_dot_product_attention(
        q_TND.transpose(0, 1)[None],
        k_SKD.transpose(0, 1)[None],
        v_SKD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=aligned,
        scale=scale,
        enable_gqa=q_TND.shape[1] != k_SKD.shape[1],
    )[0]
    return o_NTD.transpose(0, 1)


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean [queries, keys], True where a query may look; the last query is aligned with the last key."""
    query_position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_position = torch.arange(num_keys, device=device)[None]
    allowed = key_position <= query_position
    return allowed if window is None else allowed & (key_position > query_position - window)


def _checked_lengths(
    q_TND: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    window: int | None,
) -> tuple[list[int], list[int]]:
    """Lengths of each document in queries and in keys, after every precondition was checked."""
    if q_TND.dim() != 3 or k_SKD.dim() != 3 or k_SKD.shape != v_SKD.shape or q_TND.shape[2] != k_SKD.shape[2]:
        raise ValueError(
            "packed_attention wants q [T, N, D] and k, v [S, K, D] with the same D; got "
            f"q {tuple(q_TND.shape)}, k {tuple(k_SKD.shape)}, v {tuple(v_SKD.shape)}"
        )
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
    if window is not None and window < 1:
        raise ValueError(
            f"window is {window}; it counts the query's own token, so it is at least 1 (or None)"
        )
    query_lengths = _lengths(cu_seqlens, q_TND.shape[0], "cu_seqlens")
    key_lengths = _lengths(cu_seqlens_kv, k_SKD.shape[0], "cu_seqlens_kv")
    if len(query_lengths) != len(key_lengths):
        raise ValueError(
            f"cu_seqlens has {len(query_lengths)} documents and cu_seqlens_kv {len(key_lengths)}; they pair up"
        )
    for document, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        if queries > keys:
            raise ValueError(f"document {document} has {queries} queries but only {keys} keys")
    return query_lengths, key_lengths


def _lengths(cu_seqlens: torch.Tensor, total: int, name: str) -> list[int]:
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
