"""Opening the data sources a config names: are they there, made with this tokenizer, and which documents
count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import read_meta
from meditron_train.data.order import Packing, SourceOrder, held_out, stream_seed
from meditron_train.data.tokenizer import load_tokenizer
from meditron_train.errors import UserError
from meditron_train.log import get_logger

log = get_logger(__name__)

_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """What the config says about token ids."""

    directory: str
    size: int
    fingerprint: str
    special_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A dataset under a name, and those of its documents that take part."""

    name: str
    dataset: IndexedDataset
    documents: NDArray[np.int64]

    @cached_property
    def num_tokens(self) -> int:
        return int(self.dataset.document_lengths[self.documents].sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the index, the chosen documents and the .bin (its recorded hash, size and both
        ends)."""
        meta = read_meta(self.dataset.prefix)
        digest = hashlib.sha256()
        for part in (self.dataset.index_bytes, self.documents):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(f"{self.dataset.num_bytes} {meta['sha256'] if meta else ''}".encode())
        digest.update(self.dataset.token_bytes[:_EDGE_BYTES].data)
        digest.update(self.dataset.token_bytes[-_EDGE_BYTES:].data)
        return digest.hexdigest()


def vocabulary(data: Any) -> Vocabulary | None:
    """Of data.tokenizer with data.special_tokens; None when the section names no tokenizer."""
    if data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(data.tokenizer, data.special_tokens)
    return Vocabulary(
        str(data.tokenizer), tokenizer.vocab_size, tokenizer.fingerprint, tuple(data.special_tokens)
    )


def open_train_sources(data: Any, vocab: Vocabulary | None) -> list[Source]:
    """The sources of data.train without held-out documents."""
    _check_names([source.name for source in data.train], "train")
    sources = []
    for entry in data.train:
        dataset = _open(entry, vocab)
        documents = np.flatnonzero(~_held_out(entry, dataset, data)).astype(np.int64)
        sources.append(_not_empty(Source(entry.name, dataset, documents), "training"))
    if not sources:
        raise UserError("data.train names no source: give at least one {name, path}.")
    return sources


def open_validation_sources(data: Any, vocab: Vocabulary | None) -> list[Source]:
    """The sources of data.validation, then the held-out documents of data.train."""
    held_out_entries = list(data.train) if data.validation_fraction > 0 else []
    _check_names([source.name for source in [*data.validation, *held_out_entries]], "validation")
    sources = []
    for entry in data.validation:
        dataset = _open(entry, vocab)
        sources.append(Source(entry.name, dataset, np.arange(dataset.num_documents, dtype=np.int64)))
        if any(str(entry.path) == str(other.path) for other in data.train):
            log.warning("validation source %s is also trained on: %s", entry.name, entry.path)
    for entry in held_out_entries:
        dataset = _open(entry, vocab)
        documents = np.flatnonzero(_held_out(entry, dataset, data)).astype(np.int64)
        if not len(documents):
            raise UserError(
                f"data.validation_fraction = {data.validation_fraction} holds out none of the "
                f"{dataset.num_documents} "
                f"documents of {entry.name!r} ({entry.path}): raise it, or name a data.validation source "
                "instead."
            )
        sources.append(Source(entry.name, dataset, documents))
    return [_not_empty(source, "validation") for source in sources]


def blend_weights(
    entries: Sequence[Any], sources: Sequence[Source], packing: Packing, seq_len: int
) -> list[Fraction]:
    """Shares of the sources in the samples: by weight, or by token_budget over the tokens in one of its
    samples."""
    budgets = [entry.token_budget for entry in entries]
    if any(budget is not None for budget in budgets):
        without = [entry.name for entry in entries if entry.token_budget is None]
        if without:
            raise UserError(
                f"data.train gives a token_budget for some sources but not for {', '.join(without)}: "
                "give one for all of them, or a weight for all of them."
            )
        return [
            Fraction(_positive(budget, entry.name, "token_budget"))
            * _samples_per_epoch(source, packing, seq_len)
            / source.num_tokens
            for entry, budget, source in zip(entries, budgets, sources, strict=True)
        ]
    weights = [1.0 if entry.weight is None else entry.weight for entry in entries]
    # The decimal that stands in the config is meant: 0.1 is one tenth, not the nearest binary fraction.
    return [
        Fraction(repr(_positive(weight, entry.name, "weight")))
        for entry, weight in zip(entries, weights, strict=True)
    ]


def _samples_per_epoch(source: Source, packing: Packing, seq_len: int) -> int:
    dataset = source.dataset
    order = SourceOrder(dataset.file, dataset.document_lengths, source.documents, packing, seq_len, seed=0)
    return order.samples_per_epoch


def _positive(value: Any, name: str, what: str) -> Any:
    if not isfinite(value) or value <= 0:
        raise UserError(
            f"data.train source {name!r} has the {what} {value}: it must be above 0. Remove the source to "
            "leave it out."
        )
    return value


def _check_names(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{what} data sources need different names; used twice: {', '.join(twice)}.")


def _held_out(entry: Any, dataset: IndexedDataset, data: Any) -> NDArray[np.bool_]:
    return held_out(dataset.num_documents, data.validation_fraction, stream_seed(data.seed, entry.name))


def _not_empty(source: Source, use: str) -> Source:
    if source.num_tokens == 0:
        raise UserError(
            f"Data source {source.name!r} ({source.dataset.prefix}) is empty: {len(source.documents)} of its "
            f"{source.dataset.num_documents} documents are for {use}, with 0 tokens. Check what it was "
            "tokenized from."
        )
    return source


def _open(entry: Any, vocab: Vocabulary | None) -> IndexedDataset:
    dataset = IndexedDataset(entry.path)
    meta = read_meta(entry.path)
    if vocab is None:
        return dataset
    if meta is None:
        log.info("%s has no .meta.json: its token ids are checked while reading", entry.path)
    elif meta["tokenizer"]["fingerprint"] != vocab.fingerprint:
        raise UserError(
            f"Data source {entry.name!r} ({entry.path}) was made with another tokenizer: vocabulary "
            f"{meta['tokenizer']['vocab_size']}, special tokens {meta['special_tokens']}, fingerprint "
            f"{meta['tokenizer']['fingerprint'][:12]}; data.tokenizer {vocab.directory} has vocabulary "
            f"{vocab.size} "
            f"with data.special_tokens {list(vocab.special_tokens)}, fingerprint {vocab.fingerprint[:12]}. "
            "Set data.tokenizer and data.special_tokens to what the data was made with, or tokenize it again."
        )
    return dataset
