"""`data tokenize`: text files to PREFIX.bin/.idx, in several processes, in order, resumable.

While it runs, everything lies in PREFIX.tokenizing/: the token ids so far, the size and id of every
document, and a journal whose last line says how much of them is valid. A run that was killed continues from
there, and the result is the same, byte for byte. Only finished files get their names, the .idx last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from meditron_train.data.encode import Encoding, TokenizeOptions, encode_chunks
from meditron_train.data.index_file import bin_path, idx_path, write_index
from meditron_train.data.journal import FULL_DISK, Progress, WorkDirectory
from meditron_train.data.meta import FORMAT, ids_path, meta_path, sha256_file
from meditron_train.data.readers import Chunk, check_source, read_chunks
from meditron_train.data.tokenizer import Tokenizer, load_tokenizer
from meditron_train.errors import MeditronError, UserError
from meditron_train.log import get_logger

log = get_logger(__name__)

_MAX_REPORTED_LINES = 20


def tokenize(
    files: Sequence[Path | str],
    output: Path | str,
    options: TokenizeOptions,
    *,
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
    save_interval_s: float = 2.0,
) -> dict[str, Any]:
    """Tokenize `files` in this order into the dataset OUTPUT.bin/.idx (with .meta.json, .ids.jsonl); returns
    the meta.

    Bad lines are reported, counted and left out; `strict` makes the first one a UserError. Empty documents
    are left out and counted. An interrupted run is continued when files and options are the same.
    `overwrite` replaces a finished dataset and discards an interrupted run that cannot be continued.
    UserError for wrong input, MeditronError when the disk is full or a worker dies.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise UserError("No files to tokenize.")
    for path in paths:
        check_source(path)
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be at least 1.")
    targets = {
        "bin": bin_path(output),
        "ids.jsonl": ids_path(output),
        "meta.json": meta_path(output),
        "idx": idx_path(output),
    }
    _check_output(output, targets.values())
    existing = [str(path) for path in (idx_path(output), bin_path(output)) if path.exists()]
    tokenizer = load_tokenizer(options.tokenizer, options.special_tokens)
    tokenizer.encode("", options.bos, options.eos)  # a missing BOS or EOS shows now, not in a worker
    settings = _settings(paths, options, tokenizer)
    try:
        with WorkDirectory(output, settings, may_discard=overwrite) as work:
            if not work.publishing:
                if existing and not overwrite:
                    raise UserError(
                        f"{' and '.join(existing)} exist already: use --overwrite to replace them, or "
                        "another --output."
                    )
                if strict and work.progress.num_bad_lines:
                    _forget_bad_lines(work, overwrite)
                bar = _ProgressBar(paths, work.progress, show_progress)
                encoding = Encoding(options, tokenizer.fingerprint, workers)
                _encode_all(work, paths, encoding, bar, strict, save_interval_s)
                _finish(work, settings, tokenizer)
            meta = work.publish(targets)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise MeditronError(
                f"The disk is full ({error}). Free some space and run the same command again: it continues."
            ) from error
        raise
    return meta


def _check_output(output: Path | str, targets: Iterable[Path]) -> None:
    """UserError where no dataset can get that name."""
    try:
        directories = [str(path) for path in targets if path.is_dir()]
        is_directory = Path(output).is_dir() or str(output).endswith("/")
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise UserError(f"Cannot write to {output} ({error.strerror}): give another --output.") from error
    if is_directory:
        raise UserError(
            f"--output {output} is a directory: give the beginning of the files' names, such as "
            f"{Path(output) / 'train'}."
        )
    if directories:
        raise UserError(f"{' and '.join(directories)} is a directory: give another --output.")


def _settings(paths: list[Path], options: TokenizeOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What an interrupted run must agree on to be continued."""
    sources = [(str(path), path.stat()) for path in paths]
    return {
        "options": {**asdict(options), "special_tokens": list(options.special_tokens)},
        "vocabulary": tokenizer.fingerprint,
        "sources": [[path, status.st_size, status.st_mtime_ns] for path, status in sources],
    }


def _forget_bad_lines(work: WorkDirectory, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(
            f"The interrupted run has skipped {work.progress.num_bad_lines} bad lines already, which --strict "
            "forbids: use --overwrite to start anew."
        )
    work.restart()


def _encode_all(
    work: WorkDirectory,
    paths: list[Path],
    encoding: Encoding,
    bar: _ProgressBar,
    strict: bool,
    save_interval_s: float,
) -> None:
    progress, options = work.progress, encoding.options
    if progress.num_chunks:
        log.info("continuing after %d documents, %d tokens", progress.num_documents, progress.num_tokens)
    columns = (options.text_key, options.id_key)
    chunks = chain.from_iterable(
        read_chunks(path, source, columns, options.chunk_bytes) for source, path in enumerate(paths)
    )
    last_save_s = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(bar)
        remaining = islice(chunks, progress.num_chunks, None)
        for chunk, encoded in encode_chunks(remaining, encoding, stack):
            for line, reason in encoded.bad_lines:
                where = f"{paths[chunk.source]}, line {line}"
                if strict:
                    raise UserError(f"{where}: {reason}. Mend it, or leave out --strict to skip such lines.")
                if progress.num_bad_lines < _MAX_REPORTED_LINES:
                    log.warning("%s: %s; skipped", where, reason)
                progress.add_bad_line(chunk.source)
            work.append(
                chunk.source, encoded.tokens, encoded.sizes, encoded.ids, encoded.has_ids, encoded.num_empty
            )
            if time.monotonic() - last_save_s >= save_interval_s:
                work.save()
                last_save_s = time.monotonic()
            bar.update(chunk)
    if progress.num_bad_lines > _MAX_REPORTED_LINES:
        log.warning(
            "%d bad lines skipped; the first %d are named above", progress.num_bad_lines, _MAX_REPORTED_LINES
        )
    if progress.num_documents == 0:
        work.discard()
        raise UserError(
            f"No document in {', '.join(map(str, paths[:3]))}: {progress.num_empty} empty, "
            f"{progress.num_bad_lines} "
            f"bad lines. Is --text-key {options.text_key!r} right?"
        )
    work.save()


def _finish(work: WorkDirectory, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write .idx and .meta.json beside the finished .bin."""
    dtype, progress = tokenizer.dtype, work.progress
    write_index(work.path / "idx", dtype, np.fromfile(work.path / "sizes", dtype="<i4"))
    options = settings["options"]
    meta = {
        "format": FORMAT,
        "documents": progress.num_documents,
        "tokens": progress.num_tokens,
        "dtype": dtype.name,
        "sha256": sha256_file(work.path / "bin"),
        "tokenizer": {
            "directory": options["tokenizer"],
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        **{key: options[key] for key in ("special_tokens", "bos", "eos", "text_key", "id_key")},
        "bad_lines": progress.num_bad_lines,
        "empty_documents": progress.num_empty,
        "sources": [
            {"path": path, "num_bytes": num_bytes, **counts}
            for (path, num_bytes, _), counts in zip(settings["sources"], progress.sources, strict=True)
        ],
    }
    (work.path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


class _ProgressBar:
    """On stderr: share of the input read, tokens/s of this run, time left."""

    def __init__(self, paths: list[Path], progress: Progress, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        sizes = [path.stat().st_size for path in paths]
        self._bytes_before = [sum(sizes[:number]) for number in range(len(sizes))]
        self._progress, self._first_tokens, self._start_s = progress, progress.num_tokens, time.monotonic()
        self._bar = RichProgress(
            TextColumn("tokenizing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("tokenize", total=sum(sizes), rate="")

    def update(self, chunk: Chunk) -> None:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        rate = (self._progress.num_tokens - self._first_tokens) / elapsed_s
        done = self._bytes_before[chunk.source] + chunk.bytes_read
        text = f"{self._progress.num_tokens:,} tokens, {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=done, rate=text)

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
