from __future__ import annotations

from pathlib import Path

import pytest
import zstandard

from meditron_train.data.readers import Document, parse, read_chunks
from meditron_train.errors import UserError

COLUMNS = ("text", "id")


def test_chunks_number_their_lines_and_depend_on_the_content_alone(tmp_path: Path) -> None:
    lines = [b"%d" % i * (i % 7) + b"\n" for i in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines)))
    plain, packed = (
        list(read_chunks(tmp_path / name, 3, COLUMNS, 64)) for name in ("a.jsonl", "a.jsonl.zst")
    )
    assert [chunk.records for chunk in plain] == [chunk.records for chunk in packed]
    assert [line for chunk in plain for line in chunk.records] == lines
    number = 1
    for chunk in plain:
        assert (chunk.source, chunk.first_line) == (3, number)
        number += len(chunk.records)
    assert plain[-1].bytes_read == (tmp_path / "a.jsonl").stat().st_size
    assert packed[-1].bytes_read == (tmp_path / "a.jsonl.zst").stat().st_size


def test_last_line_without_newline_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n2")
    assert [chunk.records for chunk in read_chunks(tmp_path / "a.jsonl", 0, COLUMNS, 64)] == [[b"1\n", b"2"]]
    for name, content in (("b.jsonl", b""), ("b.jsonl.zst", zstandard.compress(b"")), ("c.jsonl.zst", b"")):
        (tmp_path / name).write_bytes(content)
        assert list(read_chunks(tmp_path / name, 0, COLUMNS, 64)) == []


def test_highly_compressible_zstd(tmp_path: Path) -> None:
    line = b" " * 999 + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 20_000))
    assert (
        sum(len(chunk.records) for chunk in read_chunks(tmp_path / "a.jsonl.zst", 0, COLUMNS, 1 << 20))
        == 20_000
    )


def test_garbage_after_a_zstd_frame(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"{}\n") + b"garbage")
    with pytest.raises(UserError, match="damaged or cut off"):
        list(read_chunks(tmp_path / "a.jsonl.zst", 0, COLUMNS, 64))


def test_parse() -> None:
    assert parse(b'{"text": "a", "id": 3, "x": null}\r\n', "text", "id") == Document("a", 3)
    assert parse({"text": "a"}, "text", "id") == Document("a", None)
    assert parse(b" \n", "text", "id") is None
