"""Packed attention by PyTorch's own kernels, one document after the other: runs everywhere, on every dtype.

Legend: T packed query tokens, N query heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from meditron_train.native.devices import is_gpu
from meditron_train.native.problem import Problem


def attend(problem: Problem) -> torch.Tensor:
    """Packed attention by PyTorch, document by document.

    Args:
        problem: at least one query.

    Returns:
        [T, N, D].
    """
    q_TND, k_SKD = problem.rotated()
    query_lengths, key_lengths = problem.cu_seqlens.diff().tolist(), problem.cu_seqlens_kv.diff().tolist()
    outputs = [
        _attend_document(q, k, v, problem.softmax_scale, problem.window)
        # One split and one cat: slicing document by document makes the backward several times slower.
        for q, k, v in zip(
            q_TND.split(query_lengths),
            k_SKD.split(key_lengths),
            problem.v_SKD.split(key_lengths),
            strict=True,
        )
        if q.shape[0] > 0
    ]
    return torch.cat(outputs)


def _attend_document(
    q_TND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    num_queries, num_keys = q_TND.shape[0], k_SKD.shape[0]
    aligned = num_queries == num_keys and (window is None or window >= num_keys)
    mask = None if aligned else _causal_mask(num_queries, num_keys, window, q_TND.device)
    group_size = q_TND.shape[1] // k_SKD.shape[1]
    if group_size > 1 and is_gpu(q_TND.device) and (mask is not None or q_TND.dtype == torch.float32):
        # The flash kernel takes no mask and no fp32, the memory-efficient one no groups: what is left for both keeps a
        # matrix of all scores.
        k_SKD, v_SKD = (x.repeat_interleave(group_size, dim=1) for x in (k_SKD, v_SKD))
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
