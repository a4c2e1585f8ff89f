"""Each rank's share of a packed micro-batch.

Every rank reads the micro-batch itself: the files are memory-mapped and shared by the ranks of a node, so that
reading again costs less than a broadcast. Only context parallelism cuts it.

Legend: T packed tokens of the whole micro-batch, L tokens of this context-parallel rank (T/cp), B = 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from meditron_train.native import AttentionSpan


class PackedTokens(Protocol):
    """What the data room gives: see `meditron_train.data.packed.PackedBatch`."""

    @property
    def tokens_T(self) -> torch.Tensor: ...
    @property
    def labels_T(self) -> torch.Tensor: ...
    @property
    def loss_mask_T(self) -> torch.Tensor: ...
    @property
    def positions_T(self) -> torch.Tensor: ...
    @property
    def cu_seqlens(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a micro-batch, on its device.

    Attributes:
        tokens_BL, labels_BL: int64 [1, L].
        loss_mask_BL: fp32 [1, L], 1 where the label counts.
        positions_T: integers [T], of the *whole* micro-batch.
        cu_seqlens: int32 [documents+1] on CPU, of the whole micro-batch.
        local_index: int64 [L], the global places of the local tokens; None when all are local.
        spans: which local queries see which keys.
        gather_index: see `meditron_train.model.PackedSequence`.
    """

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    loss_mask_BL: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    local_index: torch.Tensor | None
    spans: tuple[AttentionSpan, ...]
    gather_index: torch.Tensor | None


def localize(
    batch: PackedTokens, *, context_rank: int, context_size: int, device: torch.device
) -> LocalBatch:
    """This rank's part of `batch`; T must be divisible by 2·context_size when context_size > 1.

    The sequence is cut into 2·cp chunks and rank r takes chunks r and 2·cp-1-r, so that causal attention costs
    every rank about the same (Llama 3 report, section 3.3.2, and Megatron-LM do likewise).
    """
    num_tokens = batch.tokens_T.numel()
    bounds = batch.cu_seqlens.tolist()
    local_index = gather_index = None
    ranges = [(0, num_tokens)]
    if context_size > 1:
        ranges = _chunks(num_tokens, context_rank, context_size)
        local_index, gather_index = _index_tables(num_tokens, context_rank, context_size, device)

    def local(x_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Whole and narrow over the bus, cut and widened there: what is cut on the host is in pinned memory no more.
        whole = x_T.to(device, non_blocking=True)
        return (whole if local_index is None else whole[local_index]).to(dtype)[None]

    return LocalBatch(
        tokens_BL=local(batch.tokens_T, torch.int64),
        labels_BL=local(batch.labels_T, torch.int64),
        loss_mask_BL=local(batch.loss_mask_T, torch.float32),
        positions_T=batch.positions_T.to(device, non_blocking=True),
        cu_seqlens=batch.cu_seqlens,
        local_index=local_index,
        spans=_spans(bounds, ranges),
        gather_index=gather_index,
    )


@functools.lru_cache(maxsize=4)  # one for training, one for each other length of a micro-batch
def _index_tables(
    num_tokens: int, context_rank: int, context_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`local_index` and `gather_index`, sent to the device once: copies make the host wait."""
    of_ranks = [_indices(_chunks(num_tokens, rank, context_size)) for rank in range(context_size)]
    local_index = of_ranks[context_rank].to(device)
    gather_index = torch.argsort(torch.cat(of_ranks)).to(device)
    return local_index, gather_index


def _chunks(num_tokens: int, context_rank: int, context_size: int) -> list[tuple[int, int]]:
    size, rest = divmod(num_tokens, 2 * context_size)
    if rest:
        raise ValueError(f"{num_tokens} tokens do not divide into 2 x {context_size} chunks")
    return [(c * size, (c + 1) * size) for c in (context_rank, 2 * context_size - 1 - context_rank)]


def _indices(ranges: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def _spans(bounds: list[int], ranges: list[tuple[int, int]]) -> tuple[AttentionSpan, ...]:
    """One span per range of queries: the keys are those of its documents, from their start to the range's end."""
    spans = []
    query_start = 0
    for start, end in ranges:
        documents = [
            (a, min(b, end)) for a, b in zip(bounds, bounds[1:], strict=False) if a < end and b > start
        ]
        key_start = documents[0][0]
        spans.append(
            AttentionSpan(
                query_start=query_start,
                query_end=query_start + end - start,
                key_start=key_start,
                key_end=end,
                cu_seqlens=torch.tensor([0] + [b - start for _, b in documents], dtype=torch.int32),
                cu_seqlens_kv=torch.tensor([0] + [b - key_start for _, b in documents], dtype=torch.int32),
            )
        )
        query_start += end - start
    return tuple(spans)
