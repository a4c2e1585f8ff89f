"""Packed samples: several documents share one sequence and never see each other.

T: packed tokens of a micro-batch, micro_batch_size * seq_len
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditron_train.data.order import Blend, Packing, SourceOrder, integer_weights, stream_seed
from meditron_train.data.sources import (
    Source,
    blend_weights,
    open_train_sources,
    open_validation_sources,
    vocabulary,
)
from meditron_train.errors import UserError
from meditron_train.native import packing as native

_ORDER_VERSION = 1  # part of the fingerprint: raise it when the same seed begins to give another order


@dataclass
class PackedBatch:
    """One micro-batch on the CPU. Segments lie one after the other; attention must stay inside a segment.

    Labels are the next token of the same document, also where it lies beyond the segment's end; where the
    document ends, and in padding, label and loss mask are 0. Padding is a segment of its own at the end of a
    sample.
    """

    tokens_T: Tensor
    """int64 token ids."""
    labels_T: Tensor
    """int64 token ids."""
    loss_mask_T: Tensor
    """float32, 1 where the label counts."""
    positions_T: Tensor
    """int64, from 0 in every segment."""
    cu_seqlens: Tensor
    """int32 [num_segments + 1]: segment i is cu_seqlens[i]:cu_seqlens[i + 1]; the last entry is T."""


@dataclass(frozen=True)
class Segment:
    """Tokens start … start + length - 1 of a document of a source (its number in
    `PackedDataset.source_names`)."""

    source: int
    document: int
    start: int
    length: int


class PackedDataset:
    """An endless sequence of packed samples of seq_len tokens, by number.

    What sample n holds depends on the seed, the data and n alone. Each source is read epoch after epoch,
    every epoch packed and shuffled anew; `weights` (whole numbers) are the shares of the sources in the
    samples. vocab_size: ids at or above it are refused while reading (0: no such check).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[int],
        *,
        packing: Packing,
        seq_len: int,
        seed: int,
        vocab_size: int = 0,
    ) -> None:
        self.seq_len, self.packing, self.seed = seq_len, packing, seed
        self._sources = tuple(sources)
        self._vocab_size = vocab_size
        self._blend = Blend(weights)
        self._orders = [
            SourceOrder(
                source.dataset.document_lengths,
                source.documents,
                packing,
                seq_len,
                stream_seed(seed, source.name),
            )
            for source in sources
        ]

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self._sources)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._sources

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch of every source."""
        return sum(order.num_tokens for order in self._orders)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch of every source."""
        return sum(order.samples_per_epoch for order in self._orders)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of all that decides which tokens sample n holds."""
        parts: list[Any] = [_ORDER_VERSION, self.packing, self.seq_len, self.seed]
        parts += self._blend.weights.tolist()
        parts += [[source.name, source.fingerprint] for source in self._sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def segments(self, sample_number: int) -> list[Segment]:
        """What the sample holds, in order; what is missing to seq_len is padding."""
        return [Segment(*row) for row in self._rows(sample_number).tolist()]

    def _rows(self, sample_number: int) -> np.ndarray:
        """(source, document, start, length) of the segments, int64 [segments, 4]."""
        if sample_number < 0:
            raise IndexError(f"samples count from 0, not {sample_number}")
        source, index = self._blend.locate(sample_number)
        segments = self._orders[source].segments(index)
        rows = np.empty((len(segments), 4), dtype=np.int64)
        rows[:, 0], rows[:, 1:] = source, segments
        return rows

    def microbatch(self, sample_numbers: Sequence[int]) -> PackedBatch:
        """The samples with these numbers, one after the other. UserError when the data holds an impossible
        id."""
        rows = [self._rows(number) for number in sample_numbers]
        segments = np.concatenate(rows) if rows else np.empty((0, 4), dtype=np.int64)
        sample_offsets = np.cumsum([0, *(len(row) for row in rows)])
        num_tokens = len(rows) * self.seq_len
        batch = PackedBatch(
            tokens_T=torch.empty(num_tokens, dtype=torch.int64),
            labels_T=torch.empty(num_tokens, dtype=torch.int64),
            loss_mask_T=torch.empty(num_tokens, dtype=torch.float32),
            positions_T=torch.empty(num_tokens, dtype=torch.int64),
            cu_seqlens=torch.empty(0, dtype=torch.int32),
        )
        gathered = native.gather(
            [source.dataset.file for source in self._sources],
            segments,
            sample_offsets,
            self.seq_len,
            self._vocab_size,
            tokens=batch.tokens_T.numpy(),
            labels=batch.labels_T.numpy(),
            loss_mask=batch.loss_mask_T.numpy(),
            positions=batch.positions_T.numpy(),
        )
        if gathered.bad_segment >= 0:
            self._refuse_token(segments[gathered.bad_segment].tolist(), gathered.bad_token)
        batch.cu_seqlens = torch.from_numpy(gathered.cu_seqlens)
        return batch

    def _refuse_token(self, segment: list[int], token: int) -> None:
        source = self._sources[segment[0]]
        raise UserError(
            f"Document {segment[1]} of data source {source.name!r} ({source.dataset.prefix}) holds the "
            "token id "
            f"{token}, but the tokenizer knows 0..{self._vocab_size - 1}: the data was made with another "
            "tokenizer. Tokenize it again, or set data.tokenizer and data.special_tokens to what it was "
            "made with."
        )


def build_train_dataset(data: Any, seq_len: int) -> PackedDataset:
    """The blend of `data.train`, less the documents held out by `data.validation_fraction`.

    data: the config section (tokenizer, packing, seed, special_tokens, train, validation,
    validation_fraction). UserError for empty or too small data, another tokenizer's data, and wrong weights.
    """
    vocab = vocabulary(data)
    sources = open_train_sources(data, vocab)
    for source in sources:
        if data.packing == "concat" and source.num_tokens < seq_len:
            raise UserError(
                f"Data source {source.name!r} ({source.dataset.prefix}) has {source.num_tokens} tokens "
                "for training, "
                f"fewer than one sample of train.seq_len = {seq_len}: add data or lower train.seq_len."
            )
    total = sum(source.num_tokens for source in sources)
    if total < seq_len:
        raise UserError(
            f"All training data has {total} tokens, fewer than one sample of train.seq_len = {seq_len}: "
            "add data or lower train.seq_len."
        )
    weights = blend_weights(data.train, sources, data.packing, seq_len)
    return PackedDataset(
        sources,
        integer_weights(weights),
        packing=data.packing,
        seq_len=seq_len,
        seed=stream_seed(data.seed, "train"),
        vocab_size=vocab.size if vocab else 0,
    )


def build_validation_datasets(data: Any, seq_len: int) -> dict[str, PackedDataset]:
    """One dataset per name: those of `data.validation`, and the held-out documents of each training
    source."""
    vocab = vocabulary(data)
    return {
        source.name: PackedDataset(
            [source],
            [1],
            packing=data.packing,
            seq_len=seq_len,
            seed=stream_seed(data.seed, "validation"),
            vocab_size=vocab.size if vocab else 0,
        )
        for source in open_validation_sources(data, vocab)
    }
