"""JSON on disk: documents, lines, and lines compressed with zstd."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zstandard

from meditron_train.files import replace_text

ZSTD_LEVEL = 3


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace_text(path, text, durable=False, shared=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@contextmanager
def open_zstd(path: Path) -> Iterator[Any]:
    """A compressed file for writing. Its bytes depend on the content alone."""
    with open(path, "wb") as stored, zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(stored) as file:
        yield file


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a .jsonl or .jsonl.zst file."""
    with open(path, "rb") as stored:
        lines: Any = stored
        if path.suffix == ".zst":
            reader = zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
            lines = io.BufferedReader(reader, 1 << 20)
        for line in lines:
            yield json.loads(line)
