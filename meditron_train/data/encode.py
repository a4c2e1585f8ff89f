"""From chunks of text to token ids, in several processes.

Workers import this module: it must stay light (no torch), or each would take seconds to start.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection
from typing import Any

import numpy as np

from meditron_train.data.readers import BadLineError, Chunk, parse
from meditron_train.data.tokenizer import Tokenizer, load_tokenizer
from meditron_train.errors import MeditronError, UserError


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything the result depends on, besides the files."""

    tokenizer: str
    """Directory with tokenizer.model or tokenizer.json."""
    special_tokens: tuple[str, ...] = ()
    text_key: str = "text"
    id_key: str = "id"
    bos: bool = True
    eos: bool = True
    chunk_bytes: int = 4 << 20
    """Text per unit of work."""


@dataclass(frozen=True)
class Encoding:
    """How the work is done; the fingerprint is that of the tokenizer."""

    options: TokenizeOptions
    fingerprint: str
    workers: int


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


def encode_chunks(
    chunks: Iterator[Chunk], encoding: Encoding, stack: ExitStack
) -> Iterator[tuple[Chunk, Encoded]]:
    """The chunks with what they became, in order."""
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
            "A tokenization worker died (out of memory?). Run the same command again with fewer "
            "--workers: it continues."
        ) from error


def _follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and end when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def wait() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def _id_json(value: Any) -> str:
    """An id as strict JSON; NaN and infinities, which JSON does not have, as text."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(str(value))


@lru_cache(maxsize=1)
def _worker_tokenizer(directory: str, special_tokens: tuple[str, ...], fingerprint: str) -> Tokenizer:
    """Loaded once per process, not once per chunk."""
    tokenizer = load_tokenizer(directory, special_tokens)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"The tokenizer in {directory} changed during the run: start again with --overwrite.")
    return tokenizer


def _encode_chunk(chunk: Chunk, encoding: Encoding) -> Encoded:
    options = encoding.options
    tokenizer = _worker_tokenizer(options.tokenizer, options.special_tokens, encoding.fingerprint)
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
        encoded = tokenizer.encode(document.text, options.bos, options.eos)
        tokens.append(np.array(encoded, dtype=tokenizer.dtype).tobytes())
        sizes.append(len(encoded))
        has_ids |= document.id is not None
        ids.append(_id_json(document.id) + "\n")
    return Encoded(
        b"".join(tokens), np.array(sizes, dtype="<i4"), "".join(ids).encode(), has_ids, bad_lines, num_empty
    )
