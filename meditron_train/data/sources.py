"""Opening the data sources a config names: are they there, made with this tokenizer, and which documents
count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meditron_train.config.data import DataSection
from meditron_train.data.conversations import Conversations, check_conversations, fit_conversations
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import read_meta
from meditron_train.data.packing.held_out import held_out
from meditron_train.data.tokenizing.chat import ChatTemplate, chat_template
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """What the config says about token ids."""

    directory: str
    size: int
    fingerprint: str
    special_tokens: tuple[str, ...]
    chat_template: ChatTemplate | None = None


@dataclass(frozen=True)
class Source:
    """A dataset under a name, and those of its documents that take part."""

    name: str
    dataset: IndexedDataset
    documents: NDArray[np.int64]
    conversations: Conversations | None = None

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document of the dataset that are used, int64 [num_documents]."""
        lengths = self.dataset.document_lengths
        return lengths if self.conversations is None else np.minimum(lengths, self.conversations.max_length)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths[self.documents].sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the index, the chosen documents and the .bin (its recorded hash, size and both
        ends); of conversations also of what is learned."""
        meta = read_meta(self.dataset.prefix)
        digest = hashlib.sha256()
        for part in (self.dataset.index_bytes, self.documents):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(f"{self.dataset.num_bytes} {meta['sha256'] if meta else ''}".encode())
        if meta is not None and self.conversations is not None:
            digest.update(f"{meta['chat']['loss_mask_sha256']} {self.conversations.max_length}".encode())
        digest.update(self.dataset.token_bytes[:_EDGE_BYTES].data)
        digest.update(self.dataset.token_bytes[-_EDGE_BYTES:].data)
        return digest.hexdigest()


def vocabulary(data: DataSection) -> Vocabulary:
    """Of data.tokenizer with data.special_tokens and the template of data.chat."""
    tokenizer = load_tokenizer(data.tokenizer, data.special_tokens)
    return Vocabulary(
        str(data.tokenizer),
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        tuple(data.special_tokens),
        None if data.chat is None else chat_template(data.chat.template, tokenizer),
    )


def open_train_sources(
    data: DataSection, vocab: Vocabulary | None, seq_len: int | None = None
) -> list[Source]:
    """The sources of data.train without held-out documents, and without conversations that do not fit.

    Args:
        data: the section of the configuration.
        vocab: see `vocabulary`; None: any ids will do.
        seq_len: tokens per sample; only conversations have to fit one.

    Raises:
        UserError: data.chat is there, and no source holds conversations.
    """
    sources: list[Source] = []
    for entry in data.train:
        dataset = IndexedDataset(entry.path)
        for other in sources:
            if dataset.same_data(other.dataset):
                _log.warning(
                    "training sources %s and %s are the same data: %s", other.name, entry.name, entry.path
                )
        documents = np.flatnonzero(~_held_out(dataset, data)).astype(np.int64)
        sources.append(_not_empty(_source(entry.name, dataset, documents, data, vocab, seq_len), "training"))
    if data.chat is not None and all(source.conversations is None for source in sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"data.chat is there, but no training source holds conversations ({names}): tokenize them with --chat, or "
            "remove data.chat"
        )
    return sources


def open_validation_sources(
    data: DataSection, vocab: Vocabulary | None, seq_len: int | None = None
) -> list[Source]:
    """The sources of data.validation, then the held-out documents of data.train.

    Args:
        data, vocab, seq_len: as of `open_train_sources`.

    Raises:
        UserError: data.validation_fraction holds out no document of a source.
    """
    held_out_entries = list(data.train) if data.validation_fraction > 0 else []
    sources = []
    for named in data.validation:
        dataset = IndexedDataset(named.path)
        documents = np.arange(dataset.num_documents, dtype=np.int64)
        sources.append(_source(named.name, dataset, documents, data, vocab, seq_len))
        if any(dataset.same_data(IndexedDataset(other.path)) for other in data.train):
            _log.warning("validation source %s is also trained on: %s", named.name, named.path)
    for entry in held_out_entries:
        dataset = IndexedDataset(entry.path)
        documents = np.flatnonzero(_held_out(dataset, data)).astype(np.int64)
        if not len(documents):
            raise UserError(
                f"data.validation_fraction = {data.validation_fraction} holds out none of the {dataset.num_documents} "
                f"documents of {entry.name!r} ({entry.path}): raise it, or name a data.validation source instead"
            )
        sources.append(_source(entry.name, dataset, documents, data, vocab, seq_len))
    return [_not_empty(source, "validation") for source in sources]


def _held_out(dataset: IndexedDataset, data: DataSection) -> NDArray[np.bool_]:
    return held_out(dataset, data.validation_fraction, data.cache_dir)


def _not_empty(source: Source, use: str) -> Source:
    if source.num_tokens == 0:
        raise UserError(
            f"data source {source.name!r} ({source.dataset.prefix}) is empty: {len(source.documents)} of its "
            f"{source.dataset.num_documents} documents are for {use}, with 0 tokens. Check what it was "
            "tokenized from"
        )
    return source


def _source(
    name: str,
    dataset: IndexedDataset,
    documents: NDArray[np.int64],
    data: DataSection,
    vocab: Vocabulary | None,
    seq_len: int | None,
) -> Source:
    """Those of `documents` that take part.

    Raises:
        UserError: they were made with another tokenizer or another chat template.
    """
    meta = read_meta(dataset.prefix)
    _check_tokenizer(name, dataset, meta, vocab)
    template = vocab.chat_template if vocab else None
    if not check_conversations(name, dataset, meta, data.chat, template.sha256 if template else None):
        return Source(name, dataset, documents)
    assert data.chat is not None and seq_len is not None
    documents, conversations = fit_conversations(name, dataset, documents, data.chat, seq_len)
    return Source(name, dataset, documents, conversations)


def _check_tokenizer(
    name: str, dataset: IndexedDataset, meta: dict[str, Any] | None, vocab: Vocabulary | None
) -> None:
    if vocab is None:
        return
    if meta is None:
        _log.info("%s has no .meta.json: its token ids are checked while reading", dataset.prefix)
    elif meta["tokenizer"]["fingerprint"] != vocab.fingerprint:
        raise UserError(
            f"data source {name!r} ({dataset.prefix}) was made with another tokenizer: vocabulary "
            f"{meta['tokenizer']['vocab_size']}, special tokens {meta['special_tokens']}, fingerprint "
            f"{meta['tokenizer']['fingerprint'][:12]}; data.tokenizer {vocab.directory} has vocabulary {vocab.size} "
            f"with data.special_tokens {list(vocab.special_tokens)}, fingerprint {vocab.fingerprint[:12]}. "
            "Set data.tokenizer and data.special_tokens to what the data was made with, or tokenize it again"
        )
