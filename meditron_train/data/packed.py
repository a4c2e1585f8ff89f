"""Packed samples: several documents share one sequence and never see each other.

Legend: T packed tokens of the whole micro-batch, micro_batch_size * seq_len.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meditron_train.config.data import DataSection, TrainSource
from meditron_train.data.conversations import answers_among
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.packing.index_cache import IndexCache
from meditron_train.data.packing.order import Packing, PhasedBlend, SourceOrder, integer_weights, stream_seed
from meditron_train.data.sources import (
    Source,
    Vocabulary,
    open_train_sources,
    open_validation_sources,
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
    """bool, True where the label counts; fp32, its weight, where some labels weigh less than others."""
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
    every epoch packed and shuffled again.

    Args:
        sources: in the order of the numbers in `phases`.
        phases: the shares of the sources in the samples: (first sample, whole numbers), see `PhasedBlend`.
        packing, seq_len, seed: as in the configuration.
        vocab_size: ids at or above it are refused while reading (0: no such check).
        cache_dir: see `IndexCache`.
        orders: `source_orders` of the same arguments, where they have been built already.
        budget_samples: after this many samples every source has given its token_budget; None: no budgets.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[tuple[int, Sequence[int]]],
        *,
        packing: Packing,
        seq_len: int,
        seed: int,
        vocab_size: int = 0,
        cache_dir: Path | None = None,
        orders: Sequence[SourceOrder] | None = None,
        budget_samples: int | None = None,
    ) -> None:
        self.budget_samples = budget_samples
        self.seq_len, self.packing, self.seed = seq_len, packing, seed
        self._sources = tuple(sources)
        self._vocab_size = vocab_size
        self._blend = PhasedBlend(phases)
        self._orders = orders or source_orders(sources, packing, seq_len, seed, cache_dir)
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

    def samples_taken(self, num_samples: int) -> dict[str, int]:
        """How many of the first `num_samples` samples each source gives, by name."""
        return dict(zip(self.source_names, self._blend.taken(num_samples).tolist(), strict=True))

    def samples_per_epoch_of_sources(self) -> dict[str, int]:
        """Samples of one epoch of each source, by name."""
        return dict(zip(self.source_names, self._samples_per_epoch.tolist(), strict=True))

    @property
    def conversations_per_sample(self) -> dict[str, float]:
        """Of each source that holds conversations, by name."""
        return {
            source.name: len(source.documents) / number
            for source, number in zip(self._sources, self._samples_per_epoch.tolist(), strict=True)
            if source.conversations is not None
        }

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often `num_samples` samples read each source, by name."""
        per_epoch = self.samples_per_epoch_of_sources()
        return {name: taken / per_epoch[name] for name, taken in self.samples_taken(num_samples).items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of all that decides which tokens sample n holds."""
        return self.fingerprint_until(None)

    def fingerprint_until(self, num_samples: int | None) -> str:
        """The same for the first `num_samples`: phases that begin later may still change. None: for all."""
        (_, weights), *later = self._blend.phases
        begun = [[first, *shares] for first, shares in later if num_samples is None or first < num_samples]
        parts: list[Any] = [_ORDER_VERSION, self.packing, self.seq_len, self.seed, *weights]
        parts += [[source.name, source.fingerprint] for source in self._sources]
        parts += [["phases", begun]] if begun else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def segments(self, sample_number: int) -> list[Segment]:
        """What the sample holds, in order; what is missing to seq_len is padding.

        Raises:
            IndexError: the number is negative.
        """
        if sample_number < 0:
            raise IndexError(f"samples count from 0, not {sample_number}")
        sources, indices = self._blend.locate(np.array([sample_number], dtype=np.int64))
        source = int(sources[0])
        return [Segment(source, *row) for row in self._orders[source].segments(int(indices[0])).tolist()]

    def microbatch(self, sample_numbers: Sequence[int]) -> PackedBatch:
        """The samples with these numbers, one after the other.

        Raises:
            UserError: the data holds an impossible id.
        """
        return self.job(np.array([sample_numbers], dtype=np.int64)).gather()[0]

    def job(self, sample_numbers: NDArray[np.int64], *, pin_memory: bool = False) -> GatherJob:
        """What is to be gathered for micro-batches with these samples, int64 [micro-batches, samples in each].

        Raises:
            IndexError: a number is negative.
        """
        numbers = sample_numbers.reshape(-1)
        if numbers.size and numbers.min() < 0:
            raise IndexError(f"samples count from 0, not {numbers.min()}")
        sources, indices = self._blend.locate(numbers)
        epochs, samples = np.divmod(indices, self._samples_per_epoch[sources])
        pairs, which = np.unique(epochs * len(self._orders) + sources, return_inverse=True)
        chosen = [divmod(pair, len(self._orders)) for pair in pairs.tolist()]  # (epoch, source)
        for _, source in chosen:
            self._sources[source].dataset.check_unchanged()
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
        """All micro-batches, in this thread.

        Raises:
            UserError: the data holds an impossible id.
        """
        return self.finish(lambda: native.gather(*self.arguments))

    def finish(self, wait: Callable[[], tuple[NDArray[np.int32], list[int]]]) -> list[PackedBatch]:
        """All micro-batches, once `wait` has returned what `native.gather` does.

        Raises:
            UserError: the data holds an impossible id.
        """
        try:
            cu_seqlens, counts = wait()
        except native.BadToken as error:
            sample, document, token = error.args
            self._refuse_token(self.sources[self.which[sample]], document, token)
        bounds = torch.from_numpy(cu_seqlens).split(counts)
        size = self.num_tokens // max(len(counts), 1)
        tokens, labels, positions, loss_mask = self._tensors
        parts = [
            tensor.view(len(counts), size).unbind()
            for tensor in (tokens, labels, self._weighted(loss_mask), positions)
        ]
        return [PackedBatch(*rows) for rows in zip(*parts, bounds, strict=True)]

    def _weighted(self, loss_mask: Tensor) -> Tensor:
        """The loss mask of all samples; where conversations are among them, what their labels weigh."""
        seq_len = self.num_tokens // max(len(self.samples), 1)
        weights = loss_mask
        for place, (index, sample) in enumerate(zip(self.which.tolist(), self.samples.tolist(), strict=True)):
            source = self.sources[index]
            if source.conversations is None:
                continue
            here = slice(place * seq_len, (place + 1) * seq_len)
            segments = self.indexes[index].segments(sample).tolist()
            is_answer = torch.from_numpy(answers_among(source.dataset, segments, seq_len))
            if source.conversations.prompt_weight:
                weights = weights.float()  # a copy the first time
                weights[here] *= is_answer + ~is_answer * source.conversations.prompt_weight
            else:
                weights[here] *= is_answer
        return weights

    def _refuse_token(self, source: Source, document: int, token: int) -> NoReturn:
        raise UserError(
            f"document {document} of data source {source.name!r} ({source.dataset.prefix}) holds the token id {token}, "
            f"but {f'the tokenizer knows 0..{self.vocab_size - 1}' if self.vocab_size else 'ids are 0..2147483647'}: "
            "the data was made with another tokenizer. Tokenize it again, or set data.tokenizer and "
            "data.special_tokens to what it was made with"
        )


def build_train_dataset(
    data: DataSection, seq_len: int, vocab: Vocabulary | None, schedule: BatchSchedule | None = None
) -> PackedDataset:
    """The blend of `data.train`, less the documents held out by `data.validation_fraction`.

    Args:
        data: the section of the configuration.
        seq_len: tokens per sample.
        vocab: see `vocabulary`; None: any ids will do.
        schedule: says which sample `data.phases` begin with; needed only with those.

    Raises:
        UserError: the data is empty, too small, or another tokenizer's.
    """
    sources = open_train_sources(data, vocab, seq_len)
    for source in sources:
        if data.packing == "concat" and source.num_tokens < seq_len:
            raise UserError(
                f"data source {source.name!r} ({source.dataset.prefix}) has {source.num_tokens} tokens for training, "
                f"fewer than one sample of train.seq_len = {seq_len}: add data or lower train.seq_len"
            )
    total = sum(source.num_tokens for source in sources)
    if total < seq_len:
        raise UserError(
            f"all training data has {total} tokens, fewer than one sample of train.seq_len = {seq_len}: "
            "add data or lower train.seq_len"
        )
    seed = stream_seed(data.seed, "train")
    orders = source_orders(sources, data.packing, seq_len, seed, data.cache_dir)
    weights = [_weight(entry, order) for entry, order in zip(data.train, orders, strict=True)]
    return PackedDataset(
        sources,
        _phases(data, weights, schedule),
        packing=data.packing,
        seq_len=seq_len,
        seed=seed,
        vocab_size=vocab.size if vocab else 0,
        orders=orders,
        budget_samples=math.ceil(sum(weights)) if data.train[0].token_budget is not None else None,
    )


def source_orders(
    sources: Sequence[Source], packing: Packing, seq_len: int, seed: int, cache_dir: Path | None
) -> list[SourceOrder]:
    """The samples of each source. With best_fit the first epoch is packed, or found in the cache."""
    return [
        SourceOrder(
            source.dataset.file,
            source.lengths,
            source.documents,
            packing,
            seq_len,
            stream_seed(seed, source.name),
            IndexCache(source.dataset.prefix, partial(getattr, source, "fingerprint"), cache_dir),
        )
        for source in sources
    ]


def _weight(entry: TrainSource, order: SourceOrder) -> Fraction:
    """Share of a source in the samples: by weight, or by token_budget divided by the tokens per sample."""
    if entry.token_budget is None:
        # The decimal that stands in the config is meant: 0.1 is one tenth, not the nearest binary fraction.
        return Fraction(repr(entry.weight))
    return Fraction(entry.token_budget) * order.samples_per_epoch / order.num_tokens


def _phases(
    data: DataSection, weights: Sequence[Fraction], schedule: BatchSchedule | None
) -> list[tuple[int, list[int]]]:
    """(first sample, whole weights) of the blend of `data.train` and of each of `data.phases`."""
    phases = [(0, integer_weights(weights))]
    for phase in data.phases:
        assert schedule is not None
        first = schedule.samples_before(phase.from_step)
        # The decimal that stands in the config is meant, as for `data.train`.
        shares = [Fraction(repr(phase.weights.get(entry.name, 0.0))) for entry in data.train]
        phases = [(begun, before) for begun, before in phases if begun < first]
        phases.append((first, integer_weights(shares)))
    return phases


def build_validation_datasets(
    data: DataSection, seq_len: int, vocab: Vocabulary | None
) -> dict[str, PackedDataset]:
    """One dataset per name: those of `data.validation`, and the held-out documents of each training
    source."""
    return {
        source.name: PackedDataset(
            [source],
            [(0, [1])],
            packing=data.packing,
            seq_len=seq_len,
            seed=stream_seed(data.seed, "validation"),
            vocab_size=vocab.size if vocab else 0,
            cache_dir=data.cache_dir,
        )
        for source in open_validation_sources(data, vocab, seq_len)
    }
