"""Packed samples: several documents share one sequence and never see each other.

T: packed tokens of a micro-batch, micro_batch_size * seq_len
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meditron_train.data.index_cache import IndexCache
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

BYTES_PER_TOKEN = 13  # three int32 and a bool

_ORDER_VERSION = 1  # part of the fingerprint: raise it when the same seed begins to give another order


@dataclass
class PackedBatch:
    """One micro-batch on the CPU. Segments lie one after the other; attention must stay inside a segment.

    Labels are the next token of the same document, also where it lies beyond the segment's end; where the
    document ends, and in padding, label and loss mask are 0. Padding is a segment of its own at the end of a
    sample. The types are narrow, 13 bytes a token, as writing them is what loading costs; `parallel.localize`
    widens them on the device.
    """

    tokens_T: Tensor
    """int32 token ids."""
    labels_T: Tensor
    """int32 token ids."""
    loss_mask_T: Tensor
    """bool, True where the label counts."""
    positions_T: Tensor
    """int32, from 0 in every segment."""
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
    samples. vocab_size: ids at or above it are refused while reading (0: no such check). cache_dir: see
    `IndexCache`.
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
        cache_dir: Path | None = None,
    ) -> None:
        self.seq_len, self.packing, self.seed = seq_len, packing, seed
        self._sources = tuple(sources)
        self._vocab_size = vocab_size
        self._blend = Blend(weights)
        self._orders = [
            SourceOrder(
                source.dataset.file,
                source.dataset.document_lengths,
                source.documents,
                packing,
                seq_len,
                stream_seed(seed, source.name),
                IndexCache(source.dataset.prefix, partial(getattr, source, "fingerprint"), cache_dir),
            )
            for source in sources
        ]
        self._samples_per_epoch = np.array([order.samples_per_epoch for order in self._orders])
        self._buffers = native.BufferPool()

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
        return int(self._samples_per_epoch.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of all that decides which tokens sample n holds."""
        parts: list[Any] = [_ORDER_VERSION, self.packing, self.seq_len, self.seed]
        parts += self._blend.weights.tolist()
        parts += [[source.name, source.fingerprint] for source in self._sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def segments(self, sample_number: int) -> list[Segment]:
        """What the sample holds, in order; what is missing to seq_len is padding."""
        if sample_number < 0:
            raise IndexError(f"samples count from 0, not {sample_number}")
        sources, indices = self._blend.locate(np.array([sample_number], dtype=np.int64))
        source = int(sources[0])
        return [Segment(source, *row) for row in self._orders[source].segments(int(indices[0])).tolist()]

    def microbatch(self, sample_numbers: Sequence[int]) -> PackedBatch:
        """The samples with these numbers, one after the other. UserError when the data holds an impossible
        id."""
        return self.job(np.array([sample_numbers], dtype=np.int64)).gather()[0]

    def job(self, sample_numbers: NDArray[np.int64], *, pin_memory: bool = False) -> GatherJob:
        """What is to be gathered for micro-batches with these samples, int64 [micro-batches, samples in each]."""
        numbers = sample_numbers.reshape(-1)
        if numbers.size and numbers.min() < 0:
            raise IndexError(f"samples count from 0, not {numbers.min()}")
        sources, indices = self._blend.locate(numbers)
        epochs, samples = np.divmod(indices, self._samples_per_epoch[sources])
        pairs, which = np.unique(epochs * len(self._orders) + sources, return_inverse=True)
        chosen = [divmod(pair, len(self._orders)) for pair in pairs.tolist()]  # (epoch, source)
        return GatherJob(
            sources=tuple(self._sources[source] for _, source in chosen),
            indexes=[self._orders[source].index(epoch) for epoch, source in chosen],
            which=which,
            samples=samples,
            samples_per_micro_batch=sample_numbers.shape[1],
            num_tokens=numbers.size * self.seq_len,
            vocab_size=self._vocab_size,
            buffer=self._buffer(numbers.size * self.seq_len, pin_memory),
        )

    def _buffer(self, num_tokens: int, pin_memory: bool) -> Tensor:
        """Memory for a job; torch's allocator of pinned memory uses blocks again by itself."""
        num_bytes = BYTES_PER_TOKEN * num_tokens
        if pin_memory:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(self._buffers.take(num_bytes))


@dataclass(frozen=True)
class GatherJob:
    """The micro-batches of a step: where each sample lies, and the memory for all of them."""

    sources: tuple[Source, ...]
    """The source of each index."""
    indexes: list[native.SampleIndex]
    which: NDArray[np.int64]
    """int64 [samples]: the index of each sample."""
    samples: NDArray[np.int64]
    """int64 [samples]: its number there."""
    samples_per_micro_batch: int
    num_tokens: int
    """Of all micro-batches together."""
    vocab_size: int
    buffer: Tensor
    """uint8 [13 * num_tokens]: tokens, labels, positions, loss mask."""

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        integers = self.buffer[: 12 * self.num_tokens].view(torch.int32)
        tokens, labels, positions = integers.view(3, self.num_tokens).unbind()
        return tokens, labels, positions, self.buffer[12 * self.num_tokens :].view(torch.bool)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `native.gather` and `native.Prefetcher.submit`."""
        arrays = (tensor.numpy() for tensor in self._tensors)
        sizes = (self.samples_per_micro_batch, self.vocab_size)
        return (self.indexes, self.which, self.samples, *sizes, *arrays)

    def gather(self) -> list[PackedBatch]:
        """All micro-batches, in this thread. UserError when the data holds an impossible id."""
        return self.finish(lambda: native.gather(*self.arguments))

    def finish(self, wait: Callable[[], tuple[NDArray[np.int32], list[int]]]) -> list[PackedBatch]:
        """All micro-batches, once `wait` has returned what `native.gather` does. UserError as above."""
        try:
            cu_seqlens, counts = wait()
        except native.BadToken as error:
            sample, document, token = error.args
            self._refuse_token(self.sources[self.which[sample]], document, token)
        bounds = torch.from_numpy(cu_seqlens).split(counts)
        size = self.num_tokens // max(len(counts), 1)
        parts = [tensor.view(len(counts), size).unbind() for tensor in self._tensors]
        return [
            PackedBatch(*rows) for rows in zip(parts[0], parts[1], parts[3], parts[2], bounds, strict=True)
        ]

    def _refuse_token(self, source: Source, document: int, token: int) -> NoReturn:
        raise UserError(
            f"Document {document} of data source {source.name!r} ({source.dataset.prefix}) holds the "
            f"token id {token}, but "
            + (
                f"the tokenizer knows 0..{self.vocab_size - 1}"
                if self.vocab_size
                else "ids are 0..2147483647"
            )
            + ": the data was made with another tokenizer. Tokenize it again, or set data.tokenizer and "
            "data.special_tokens to what it was made with."
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
        cache_dir=data.cache_dir,
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
            cache_dir=data.cache_dir,
        )
        for source in open_validation_sources(data, vocab)
    }
