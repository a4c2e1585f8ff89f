"""From chunks of text to token ids, in several processes.

Workers import this module: it must stay light (no torch), or each would take seconds to start.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meditron_train.config.chat import ChatTemplateName
from meditron_train.data.tokenizing.chat import ChatEncoder, ChatTemplate
from meditron_train.data.tokenizing.conversation import parse_conversation
from meditron_train.data.tokenizing.fast import FastTokenizer
from meditron_train.data.tokenizing.readers import BadLineError, Chunk, parse, parse_object
from meditron_train.data.tokenizing.tokenizer import Definition, Tokenizer, tokenizer_of
from meditron_train.errors import MeditronError, UserError
from meditron_train.processes import end_with


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything the result depends on, besides the files."""

    tokenizer: str
    """Directory with tokenizer.model or tokenizer.json."""
    special_tokens: tuple[str, ...] = ()
    text_key: str = "text"
    id_key: str = "id"
    bos: bool | None = None
    """None: as the tokenizer does (not where it states that it has no BOS, or adds none)."""
    eos: bool = True
    txt: Literal["line", "file"] = "line"
    """What a document of a .txt file is."""
    chunk_bytes: int = 1 << 20
    """Text per unit of work."""
    chat: ChatTemplateName | None = None
    """Rows are conversations, rendered by this template; text_key, bos, eos and txt mean nothing then."""


@dataclass(frozen=True)
class Encoding:
    """How the work is done.

    Attributes:
        definition: the file that holds the tokenizer's, so that no worker has to make it.
    """

    options: TokenizeOptions
    definition: Path
    fingerprint: str
    files: tuple[Path, ...]
    """The sources, to be named in errors."""
    workers: int
    check_every: int = 0
    """0: with sentencepiece. N: with the fast encoder, and every Nth document with both."""
    chat: ChatTemplate | None = None
    """Of conversations."""


@dataclass(frozen=True)
class Encoded:
    """What became of one chunk."""

    tokens: bytes
    sizes: np.ndarray
    """Tokens of each document, int32."""
    ids: bytes
    """One JSON value and newline per document."""
    has_ids: bool
    bad_lines: list[tuple[int, str]]
    num_empty: int
    loss_mask: bytes = b""
    """Of conversations: 1 for each token of the assistant's, else 0, a byte each."""


def encode_chunks(
    chunks: Iterator[Chunk], encoding: Encoding, stack: ExitStack
) -> Iterator[tuple[Chunk, Encoded]]:
    """The chunks with what they became, in order.

    Raises:
        MeditronError: a worker died.
    """
    if encoding.workers == 1:
        for chunk in chunks:
            yield chunk, _encode_chunk(chunk, encoding)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(encoding.workers, spawn, initializer=_follow_parent)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(_encode_chunk, chunk, encoding)))
            if len(pending) > 2 * encoding.workers:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        for chunk, future in pending:
            yield chunk, future.result()
    except BrokenProcessPool as error:
        raise MeditronError(
            "a tokenization worker died (out of memory?). Run the same command again with fewer "
            "--workers: it continues"
        ) from error


def _follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and end when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with(parent.sentinel)


def _id_json(value: Any) -> str:
    """An id as strict JSON; NaN and infinities, which JSON does not have, as text."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(str(value))


@lru_cache(maxsize=1)
def _worker_tokenizer(path: Path, fingerprint: str, fast: bool) -> Tokenizer:
    """Loaded once per process, not once per chunk."""
    definition = _read_definition(path)
    return FastTokenizer(definition) if fast else tokenizer_of(definition)


@lru_cache(maxsize=1)
def _worker_chat_encoder(path: Path, fingerprint: str, template: ChatTemplate) -> ChatEncoder:
    return ChatEncoder(_read_definition(path), template)


def _read_definition(path: Path) -> Definition:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Definition(**{**content, "special_tokens": tuple(content["special_tokens"])})


def _encode_chunk(chunk: Chunk, encoding: Encoding) -> Encoded:
    if encoding.chat is not None:
        return _encode_conversations(chunk, encoding, encoding.chat)
    options = encoding.options
    tokenizer = _worker_tokenizer(encoding.definition, encoding.fingerprint, encoding.check_every > 0)
    tokens: list[bytes] = []
    sizes: list[int] = []
    ids: list[str] = []
    bad_lines: list[tuple[int, str]] = []
    num_empty = 0
    has_ids = False
    for line, record in enumerate(chunk.records, chunk.first_line):
        try:
            document = parse(record, options.text_key, options.id_key)
        except BadLineError as error:
            bad_lines.append((line, str(error)))
            continue
        if document is None:
            continue
        if not document.text.strip():
            num_empty += 1
            continue
        if isinstance(tokenizer, FastTokenizer) and line % encoding.check_every == 0:
            tokenizer.check(document.text)
        try:
            encoded = tokenizer.encode(document.text, bool(options.bos), options.eos)
        except UserError as error:
            raise UserError(f"{encoding.files[chunk.source]}, line {line}: {error}") from None
        tokens.append(np.array(encoded, dtype=tokenizer.dtype).tobytes())
        sizes.append(len(encoded))
        has_ids |= document.id is not None
        ids.append(_id_json(document.id) + "\n")
    return Encoded(
        b"".join(tokens), np.array(sizes, dtype="<i4"), "".join(ids).encode(), has_ids, bad_lines, num_empty
    )


def _encode_conversations(chunk: Chunk, encoding: Encoding, template: ChatTemplate) -> Encoded:
    encoder = _worker_chat_encoder(encoding.definition, encoding.fingerprint, template)
    tokens: list[bytes] = []
    sizes: list[int] = []
    ids: list[str] = []
    masks: list[bytes] = []
    bad_lines: list[tuple[int, str]] = []
    has_ids = False
    for line, record in enumerate(chunk.records, chunk.first_line):
        try:
            row = parse_object(record)
            if row is None:
                continue
            encoded, mask = encoder.encode(parse_conversation(row))
        except BadLineError as error:
            bad_lines.append((line, str(error)))
            continue
        tokens.append(np.array(encoded, dtype=encoder.dtype).tobytes())
        sizes.append(len(encoded))
        masks.append(bytes(mask))
        row_id = row.get(encoding.options.id_key)
        has_ids |= row_id is not None
        ids.append(_id_json(row_id) + "\n")
    return Encoded(
        b"".join(tokens),
        np.array(sizes, dtype="<i4"),
        "".join(ids).encode(),
        has_ids,
        bad_lines,
        num_empty=0,
        loss_mask=b"".join(masks),
    )
