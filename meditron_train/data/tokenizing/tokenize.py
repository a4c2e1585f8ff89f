"""`data tokenize`: text files to PREFIX.bin/.idx, in several processes, in order, resumable.

While it runs, everything lies in PREFIX.tokenizing/: the token ids so far, the size and id of every
document, and a journal whose last line says how much of them is valid. A run that was killed continues from
there, and the result is the same, byte for byte. Only finished files get their names, the .idx last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from meditron_train.data.index_file import bin_path, idx_path, write_index
from meditron_train.data.meta import FORMAT, ids_path, loss_mask_path, meta_path
from meditron_train.data.tokenizing.chat import ChatTemplate, chat_template
from meditron_train.data.tokenizing.conversation import parse_conversation
from meditron_train.data.tokenizing.encode import Encoding, TokenizeOptions, encode_chunks
from meditron_train.data.tokenizing.fast import FastEncoderDiffersError, prove_fast
from meditron_train.data.tokenizing.journal import Tally, WorkDirectory
from meditron_train.data.tokenizing.readers import (
    BadLineError,
    Chunk,
    check_records,
    check_source,
    parse,
    parse_object,
    read_chunks,
)
from meditron_train.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import is_disk_full, overlap, sha256_file
from meditron_train.log import get_logger

_log = get_logger(__name__)

_MAX_REPORTED_LINES = 20
_SAMPLE_BYTES, _SAMPLE_DOCUMENTS = 1 << 20, 500  # of each file, to prove the fast encoder on


def tokenize(
    files: Sequence[Path | str],
    output: Path | str,
    options: TokenizeOptions,
    *,
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
    check_every: int = 0,
    save_interval_s: float = 2.0,
) -> dict[str, Any]:
    """Tokenize `files` in this order into the dataset OUTPUT.bin/.idx (with .meta.json, .ids.jsonl); returns its meta.

    Bad lines are reported, counted and left out. Empty documents are left out and counted. An interrupted run
    is continued when files and options are the same.

    Args:
        files: JSON lines, Parquet or text (`readers`).
        output: prefix of the dataset.
        options: everything that decides the result.
        workers: processes that encode.
        strict: the first bad line is a UserError.
        overwrite: replace a finished dataset, and discard an interrupted run that cannot be continued.
        show_progress: draw a bar.
        check_every: use a faster encoder where it proves identical on a sample of the files, and compare
            every Nth document (`fast`); 0: do not. The result is the same.
        save_interval_s: least time between two saved states.

    Raises:
        UserError: the input is wrong.
        MeditronError: the disk is full or a worker died.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise UserError("no files to tokenize")
    for path in paths:
        check_source(path)
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be at least 1")
    targets = {
        "bin": bin_path(output),
        "ids.jsonl": ids_path(output),
        "loss_mask.bin": loss_mask_path(output),
        "meta.json": meta_path(output),
        "idx": idx_path(output),
    }
    _check_output(output, targets.values())
    _check_inputs_stay(output, targets.values(), [*paths, Path(options.tokenizer)])
    existing = [str(path) for path in targets.values() if path.exists()]
    tokenizer = load_tokenizer(options.tokenizer, options.special_tokens)
    template = None if options.chat is None else chat_template(options.chat, tokenizer)
    options = _with_ends(options, tokenizer)
    _check_rows(paths, options)
    settings = _settings(paths, options, tokenizer, template)
    try:
        with WorkDirectory(output, settings, may_discard=overwrite) as work:
            if not work.publishing:
                if existing and not overwrite:
                    names = ", ".join(existing)
                    raise UserError(
                        f"already there: {names}. Use --overwrite to replace them, or another --output"
                    )
                if strict and work.progress.num_bad_lines:
                    _forget_bad_lines(work, overwrite)
                if template or (check_every and not prove_fast(tokenizer, _sample(paths, options))):
                    check_every = 0
                definition = work.path / "tokenizer.json"
                definition.write_text(json.dumps(asdict(tokenizer.definition)), encoding="utf-8")
                encoding = Encoding(
                    options, definition, tokenizer.fingerprint, tuple(paths), workers, check_every, template
                )
                bar = partial(_ProgressBar, paths, enabled=show_progress)
                try:
                    _encode_all(work, paths, encoding, bar, strict, save_interval_s)
                except FastEncoderDiffersError as error:
                    _log.warning(
                        "starting again with sentencepiece: the fast encoder differs from it on %s", error
                    )
                    work.restart()
                    encoding = replace(encoding, check_every=0)
                    _encode_all(work, paths, encoding, bar, strict, save_interval_s)
                _finish(work, settings, tokenizer, template)
            meta = work.publish(targets)
    except OSError as error:
        if is_disk_full(error):
            raise MeditronError(
                f"the disk is full ({error}). Free some space and run the same command again: it continues"
            ) from error
        raise
    return meta


def _sample(paths: list[Path], options: TokenizeOptions) -> Iterator[str]:
    """Texts from the beginning of every file."""
    for path in paths:
        columns = (options.text_key, options.id_key)
        for chunk in islice(read_chunks(path, 0, columns, _SAMPLE_BYTES, options.txt), 1):
            for record in chunk.records[:_SAMPLE_DOCUMENTS]:
                with suppress(BadLineError):
                    document = parse(record, options.text_key, options.id_key)
                    if document is not None:
                        yield document.text


def _check_output(output: Path | str, targets: Iterable[Path]) -> None:
    """Check that a dataset can get that name.

    Raises:
        UserError: it cannot.
    """
    try:
        directories = [str(path) for path in targets if path.is_dir()]
        is_directory = Path(output).is_dir() or str(output).endswith("/")
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise UserError(f"cannot write to {output} ({error.strerror}): give another --output") from error
    if is_directory:
        raise UserError(
            f"--output {output} is a directory: give the beginning of the files' names, such as "
            f"{Path(output) / 'train'}"
        )
    if directories:
        raise UserError(f"{' and '.join(directories)} is a directory: give another --output")


def _check_inputs_stay(output: Path | str, targets: Iterable[Path], inputs: Sequence[Path]) -> None:
    """Check that no output would take the place of something that is read, --overwrite or not.

    Raises:
        UserError: one would.
    """
    for target in (*targets, Path(f"{output}.tokenizing")):
        for source in inputs:
            # Beside a tokenizer's files there is room for others.
            if (how := overlap(target, source)) and how != "lies inside":
                raise UserError(
                    f"--output {output}: {target} {how} {source}, which is read: give another --output"
                )


def _with_ends(options: TokenizeOptions, tokenizer: Tokenizer) -> TokenizeOptions:
    """The options with the default of `bos`; of conversations the template says how they begin and end."""
    if options.chat is not None:
        return replace(options, bos=False, eos=False)
    if options.bos is None:
        options = replace(options, bos=tokenizer.adds_bos is not False)
    # A missing BOS or EOS shows now, not in a worker.
    tokenizer.encode("", bool(options.bos), options.eos)
    return options


def _check_rows(paths: list[Path], options: TokenizeOptions) -> None:
    """Refuse a file that cannot hold any document."""
    for path in paths:
        if options.chat is None:
            check_records(
                path,
                partial(parse, text_key=options.text_key, id_key=""),
                "Name the key of the text by --text-key",
            )
        elif ".jsonl" not in path.suffixes:
            raise UserError(f"{path}: conversations are read from JSON lines (.jsonl, .jsonl.gz, .jsonl.zst)")
        else:
            check_records(path, _conversation, "A row of --chat is a conversation")


def _conversation(record: Any) -> object | None:
    row = parse_object(record)
    return None if row is None else parse_conversation(row)


def _settings(
    paths: list[Path], options: TokenizeOptions, tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, Any]:
    """What an interrupted run must agree on to be continued."""
    sources = [(str(path), path.stat()) for path in paths]
    return {
        "options": {**asdict(options), "special_tokens": list(options.special_tokens)},
        "vocabulary": tokenizer.fingerprint,
        "chat_template": template and template.sha256,
        "sources": [[path, status.st_size, status.st_mtime_ns] for path, status in sources],
    }


def _forget_bad_lines(work: WorkDirectory, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(
            f"the interrupted run has skipped {work.progress.num_bad_lines} bad lines already, which --strict "
            "forbids: use --overwrite to start from scratch"
        )
    work.restart()


def _encode_all(
    work: WorkDirectory,
    paths: list[Path],
    encoding: Encoding,
    make_bar: Callable[[Tally], _ProgressBar],
    strict: bool,
    save_interval_s: float,
) -> None:
    progress, options = work.progress, encoding.options
    bar = make_bar(progress)
    if progress.num_chunks:
        _log.info("continuing after %d documents, %d tokens", progress.num_documents, progress.num_tokens)
    columns = (options.text_key, options.id_key)
    chunks = chain.from_iterable(
        read_chunks(path, source, columns, options.chunk_bytes, options.txt)
        for source, path in enumerate(paths)
    )
    last_save_s = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(bar)
        remaining = islice(chunks, progress.num_chunks, None)
        for chunk, encoded in encode_chunks(remaining, encoding, stack):
            for line, reason in encoded.bad_lines:
                where = f"{paths[chunk.source]}, line {line}"
                if strict:
                    raise UserError(f"{where}: {reason}. Fix it, or leave out --strict to skip such lines")
                if progress.num_bad_lines < _MAX_REPORTED_LINES:
                    _log.warning("%s: %s; skipped", where, reason)
                progress.add_bad_line(chunk.source)
            work.append(
                chunk.source,
                encoded.tokens,
                encoded.sizes,
                encoded.ids,
                encoded.loss_mask,
                has_ids=encoded.has_ids,
                num_empty=encoded.num_empty,
            )
            if time.monotonic() - last_save_s >= save_interval_s:
                work.save()
                last_save_s = time.monotonic()
            bar.update(chunk)
    if progress.num_bad_lines > _MAX_REPORTED_LINES:
        _log.warning(
            "%d bad lines skipped; the first %d are named above", progress.num_bad_lines, _MAX_REPORTED_LINES
        )
    if progress.num_documents == 0:
        work.discard()
        hint = "" if options.chat else f". Is --text-key {options.text_key!r} right?"
        raise UserError(
            f"no document in {', '.join(map(str, paths[:3]))}: {progress.num_empty} empty, "
            f"{progress.num_bad_lines} bad lines{hint}"
        )
    work.save()


def _finish(
    work: WorkDirectory, settings: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
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
        **({} if template is None else {"chat": _describe_chat(work.path / "loss_mask.bin", template)}),
        **{key: options[key] for key in ("special_tokens", "bos", "eos", "text_key", "id_key")},
        "bad_lines": progress.num_bad_lines,
        "empty_documents": progress.num_empty,
        "sources": [
            {"path": path, "num_bytes": num_bytes, **counts}
            for (path, num_bytes, _), counts in zip(settings["sources"], progress.sources, strict=True)
        ],
    }
    (work.path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _describe_chat(loss_mask: Path, template: ChatTemplate) -> dict[str, Any]:
    return {
        "template": template.name,
        "template_sha256": template.sha256,
        "loss_tokens": int(np.count_nonzero(np.fromfile(loss_mask, np.uint8))),
        "loss_mask_sha256": sha256_file(loss_mask),
    }


class _ProgressBar:
    """On stderr: share of the input read, tokens/s of this run, time left."""

    def __init__(self, paths: list[Path], progress: Tally, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        sizes = [path.stat().st_size for path in paths]
        self._bytes_before = [sum(sizes[:number]) for number in range(len(sizes))]
        self._progress, self._first_tokens, self._start_s = progress, progress.num_tokens, time.monotonic()
        self._bar = Progress(
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
