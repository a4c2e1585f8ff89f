from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from meditron_train.data.tokenizing import readers
from meditron_train.data.tokenizing.readers import BadLineError, Document, parse, read_chunks
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


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_a_line_beyond_all_measure_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """A gigabyte of one line may be a megabyte of gzip."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    fits = b'{"text": "' + b"a" * 87 + b'"}'
    lines = [
        b'{"text": "x"}\n',
        b"b" * 300 + b"\n",
        fits + b"\n",
        b"b" * 101 + b"\n",
        b'{"text": "y"}\n',
        b"c" * 500,
    ]
    assert len(fits) == 99
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    chunks = list(read_chunks(tmp_path / "a.jsonl.gz", 0, COLUMNS, chunk_bytes))
    records = [record for chunk in chunks for record in chunk.records]
    assert [chunk.first_line for chunk in chunks] == [
        1 + sum(len(before.records) for before in chunks[:n]) for n in range(len(chunks))
    ]
    assert max(map(len, records)) <= 100
    found = []
    for record in records:
        try:
            document = parse(record, "text", "id")
            found.append(None if document is None else document.text)
        except BadLineError as error:
            found.append(str(error))
    too_long = "more than 100 bytes in one document: split it"
    assert found == ["x", too_long, "a" * 87, too_long, "y", too_long]


def test_a_text_file_beyond_all_measure_is_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    for size, is_document in ((100, True), (101, False)):
        (tmp_path / "a.txt").write_bytes(b"a" * size)
        ((record,),) = (chunk.records for chunk in read_chunks(tmp_path / "a.txt", 0, COLUMNS, 64, "file"))
        assert isinstance(record, readers.TooLong) is not is_document


def test_highly_compressible_zstd(tmp_path: Path) -> None:
    line = b" " * 999 + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 20_000))
    assert (
        sum(len(chunk.records) for chunk in read_chunks(tmp_path / "a.jsonl.zst", 0, COLUMNS, 1 << 20))
        == 20_000
    )


def test_zstd_with_a_large_window(tmp_path: Path) -> None:
    """As `zstd --long=28` writes it: a window above the default limit of 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(b"{}\n") + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << 28
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert [chunk.records for chunk in read_chunks(tmp_path / "a.jsonl.zst", 0, COLUMNS, 64)] == [[b"{}\n"]]


@pytest.mark.parametrize(
    "kind, expected",
    [
        (pa.timestamp("ns"), "2262-04-11 23:47:16.854775807"),
        (pa.duration("ns"), 2**63 - 1),
        (pa.time64("ns"), "00:00:00.000000001"),
        (pa.timestamp("ms"), "20000-01-01 00:00:00.000"),
        (pa.int64(), 2**63 - 1),
        (pa.string(), "a"),
    ],
    ids=str,
)
def test_parquet_ids(tmp_path: Path, kind: pa.DataType, expected: str | int) -> None:
    numbers = {pa.time64("ns"): 1, pa.timestamp("ms"): 568_971_820_800_000}
    value = "a" if kind == pa.string() else numbers.get(kind, 2**63 - 1)
    ids = pa.array([value, None], pa.string() if kind == pa.string() else pa.int64()).cast(kind)
    pq.write_table(pa.table({"id": ids, "text": ["x", "y"]}), tmp_path / "a.parquet")
    (chunk,) = read_chunks(tmp_path / "a.parquet", 0, COLUMNS, 64)
    assert [record["id"] for record in chunk.records] == [expected, None]


def test_parquet_values_that_python_does_not_have(tmp_path: Path) -> None:
    times = pa.array([[2**40]], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("s")))  # the year 36812
    pq.write_table(pa.table({"id": times, "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet"):
        list(read_chunks(tmp_path / "a.parquet", 0, COLUMNS, 64))


def test_garbage_after_a_zstd_frame(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"{}\n") + b"garbage")
    with pytest.raises(UserError, match="damaged or cut off"):
        list(read_chunks(tmp_path / "a.jsonl.zst", 0, COLUMNS, 64))


def test_parse() -> None:
    assert parse(b'{"text": "a", "id": 3, "x": null}\r\n', "text", "id") == Document("a", 3)
    assert parse({"text": "a"}, "text", "id") == Document("a", None)
    assert parse(b" \n", "text", "id") is None
