"""JSON lines and Parquet, guidelines among them, and lines that are wrong in every way."""

from __future__ import annotations

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from meditron_train.corpus import records
from meditron_train.corpus.document import Document
from meditron_train.corpus.readers import guidelines, jsonl
from meditron_train.errors import UserError
from tests.corpus.reading import read_source, said

CODE = "def f():\n    return 1\n\n\n# [table] https://example.org\n"


def test_text_is_kept_as_it_is_but_for_special_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CODE, "link": "x", "n": 3}) + "\n\n")
    options = {"metadata": {"url": "link", "date": "none"}}
    documents, problems = read_source(jsonl, tmp_path, **options)
    text = CODE.replace("[table]", "(table)")
    assert documents == [Document("a.jsonl:1", text, {"kind": "text", "url": "x"})]
    assert problems == []
    (marked,), _ = read_source(jsonl, tmp_path, is_marked=True, **options)
    assert marked.text == CODE


def test_all_kinds_of_files(tmp_path):
    lines = b'{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n'
    (tmp_path / "1.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(lines[:23]) + zstandard.compress(lines[23:]))
    pq.write_table(
        pa.table({"text": ["a", "b"], "id": [1, 2], "other": [None, None]}), tmp_path / "4.parquet"
    )
    documents, problems = read_source(jsonl, tmp_path)
    assert [document.text for document in documents] == ["a", "b"] * 4
    assert [document.id for document in documents][-2:] == ["4.parquet:1", "4.parquet:2"]
    assert problems == []
    # With ids, the last file that has them keeps them.
    documents, problems = read_source(jsonl, tmp_path, id_key="id")
    assert [document.id for document in documents] == ["1", "2"]
    assert len(problems) == 6
    assert problems[0].detail == "1: the same id as record 0 of 4.parquet with the same text, which is kept"


def test_bad_lines_are_reported_and_the_others_read(tmp_path):
    lines = [
        b'{"text": "good", "id": "a"}',
        b'{"text": "caf\xe9", "id": "b"}',
        b'{"text": "half',
        b"[1]",
        b'{"text": 5, "id": "c"}',
        b'{"text": "no id"}',
        b'{"text": " ", "id": "d"}',
        b'{"text": "' + b"x" * 1000 + b'", "id": "e"}',
        b"",
        b'{"text": "clash", "id": "f"}',
        b'{"text": "clash, too", "id": "f"}',
        b'{"text": "\\ud800", "id": "g"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, problems = read_source(jsonl, tmp_path, id_key="id", max_record_bytes=500)
    assert [document.id for document in documents] == ["a", "f"]
    assert documents[1].text == "clash, too"
    assert said(problems) == [
        "a.jsonl | line 2 | invalid_utf8",
        "a.jsonl | line 3 | broken_json",
        "a.jsonl | line 4 | broken_json",
        "a.jsonl | line 5 | broken_file",
        "a.jsonl | line 6 | broken_file",
        "a.jsonl | line 7 | empty",
        "a.jsonl | line 8 | too_large",
        "a.jsonl | line 10 | duplicate_id",
        "a.jsonl | line 12 | broken_json",
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_files(tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"text {n * 7919}"}) + "\n" for n in range(20_000)).encode()
    data = gzip.compress(lines) if suffix == "gz" else zstandard.compress(lines)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(data[: len(data) // 2])
    documents, problems = read_source(jsonl, tmp_path)
    assert 100 < len(documents) < 19_800
    assert [problem.reason.value for problem in problems][-1] == "truncated"


def test_a_parquet_row_has_a_limit(tmp_path):
    texts = ["a", "x" * 1000, "b", None, "y" * 400] * 20
    table = pa.table({"text": texts, "other": ["z" * 5000] * 100})  # which is not read
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    documents, problems = read_source(jsonl, tmp_path, max_record_bytes=500)
    assert [document.text[0] for document in documents] == ["a", "b", "y"] * 20
    assert said(problems)[:3] == [
        "a.parquet | line 2 | too_large",
        "a.parquet | line 4 | broken_file",
        "a.parquet | line 7 | too_large",
    ]


def test_batches_of_a_parquet_file_have_a_size(tmp_path):
    pq.write_table(pa.table({"text": [f"{n} " * 200_000 for n in range(16)]}), tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert records._batch_rows(file.metadata.row_group(0)) < 16
    documents, problems = read_source(jsonl, tmp_path)
    assert (len(documents), problems) == (16, [])


def test_dates_of_a_parquet_file_become_text(tmp_path):
    day = datetime.date(2024, 5, 6)
    row = {"text": "a", "when": day, "all": [{"day": day, "n": 1}, {"day": None, "n": 2}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (document,), _ = read_source(jsonl, tmp_path, metadata={"when": "when", "all": "all"})
    expected = {"when": "2024-05-06", "all": [{"day": "2024-05-06", "n": 1}, {"day": None, "n": 2}]}
    assert document.metadata == {"kind": "text", **expected}


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    assert said(read_source(jsonl, tmp_path)[1]) == ["a.parquet | after row 0 | broken_file"]
    with pytest.raises(UserError, match="there is no file"):
        jsonl.shards({"path": str(tmp_path / "none")})


GUIDELINE = {
    "id": "g1",
    "source": "who",
    "title": "Fever in Adults",
    "clean_text": "# Diagnosis\n- Measure the temperature.\n  - Twice a day\n\n\n\nSee https://example.org/a.\r\nTreat.",
    "raw_text": "raw",
    "url": "https://example.org/fever",
    "overview": "About fever.",
}
GUIDELINE_TEXT = "Fever in Adults\n\n# Diagnosis\n- Measure the temperature.\n  - Twice a day\n\nSee.\nTreat."


def test_guidelines(tmp_path):
    titled = {**GUIDELINE, "id": "g2", "clean_text": "FEVER IN ADULTS\nTreat it."}
    raw = {**GUIDELINE, "id": "g3", "clean_text": "", "title": None}
    nothing = {**GUIDELINE, "id": "g4", "clean_text": "", "raw_text": None}
    guideline_records = [GUIDELINE, titled, raw, nothing, {"id": "g5"}, {**GUIDELINE, "id": "g2"}]
    (tmp_path / "open_guidelines.jsonl").write_text("\n".join(map(json.dumps, guideline_records)))
    documents, problems = read_source(guidelines, tmp_path)
    assert [(document.id, document.text) for document in documents] == [
        ("g1", GUIDELINE_TEXT),
        ("g3", "raw"),
        ("g2", GUIDELINE_TEXT),
    ]
    assert documents[0].metadata == {
        "kind": "guideline",
        "title": "Fever in Adults",
        "source": "who",
        "url": "https://example.org/fever",
    }
    assert said(problems) == [
        "open_guidelines.jsonl | line 2 | duplicate_id",
        "open_guidelines.jsonl | line 4 | empty",
        "open_guidelines.jsonl | line 5 | broken_file",
    ]
    (tmp_path / "open_guidelines.jsonl").write_text(json.dumps({**titled, "id": None}))
    (document,), _ = read_source(guidelines, tmp_path, overview=True)
    assert document.id == "open_guidelines.jsonl:1"
    assert document.text == "FEVER IN ADULTS\n\nAbout fever.\n\nTreat it."
