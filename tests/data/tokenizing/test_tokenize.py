from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.tokenizing import tokenize as tokenize_module
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.data.trace import read_ids
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import sha256_file
from tests.checkpoint.tokenizer.shapes import byte_level
from tests.long import mostly_long

SUFFIXES = ("bin", "idx", "meta.json", "ids.jsonl")


@pytest.fixture
def options(sentencepiece_directory: Path) -> TokenizeOptions:
    return TokenizeOptions(tokenizer=str(sentencepiece_directory), chunk_bytes=1500)


@pytest.fixture
def source(tmp_path: Path, corpus_lines: list[str]) -> Path:
    path = tmp_path / "in.jsonl"
    records = [{"id": f"doc-{i}", "text": text} for i, text in enumerate(corpus_lines)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}


def test_documents_ids_and_meta(
    tmp_path: Path, source: Path, options: TokenizeOptions, corpus_lines: list[str]
) -> None:
    meta = tokenize([source], tmp_path / "out", options)
    tokenizer = load_tokenizer(options.tokenizer)
    dataset = IndexedDataset(tmp_path / "out")
    expected = [tokenizer.encode(text) for text in corpus_lines]
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == expected
    assert dataset.dtype == "uint16"
    assert read_ids(tmp_path / "out", [7, 299]) == {7: "doc-7", 299: "doc-299"}
    assert meta["documents"] == 300
    assert meta["tokens"] == sum(map(len, expected))
    assert meta["sha256"] == sha256_file(tmp_path / "out.bin")
    assert meta["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert meta["sources"] == [
        {
            "path": str(source),
            "num_bytes": source.stat().st_size,
            "documents": 300,
            "tokens": meta["tokens"],
            "empty_documents": 0,
            "bad_lines": 0,
        }
    ]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.jsonl", *(f"out.{suffix}" for suffix in SUFFIXES)}


def test_workers_do_not_change_a_byte(tmp_path: Path, source: Path, options: TokenizeOptions) -> None:
    tokenize([source, source], tmp_path / "one", options)
    tokenize([source, source], tmp_path / "three", options, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_all_formats_give_the_same_tokens(
    tmp_path: Path, source: Path, options: TokenizeOptions, corpus_lines: list[str]
) -> None:
    content = source.read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1
    files = {
        "in.jsonl.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),  # two members
        "in.jsonl.zst": b"".join(zstandard.compress(part) for part in (content[:half], b"", content[half:])),
    }
    for name, packed in files.items():
        (tmp_path / name).write_bytes(packed)
    table = {"text": corpus_lines, "id": [f"doc-{i}" for i in range(300)], "other": [0] * 300}
    pq.write_table(pa.table(table), tmp_path / "in.parquet", row_group_size=70)
    tokenize([source], tmp_path / "plain", options)
    for name in (*files, "in.parquet"):
        tokenize([tmp_path / name], tmp_path / "other", options, overwrite=True)
        for suffix in ("bin", "idx", "ids.jsonl"):
            other = contents(tmp_path / "other")[suffix]
            assert other == contents(tmp_path / "plain")[suffix], (name, suffix)


def test_bad_lines_are_named_and_counted(
    tmp_path: Path,
    options: TokenizeOptions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("meditron_train"), "propagate", True)
    lines = {
        1: b'\xef\xbb\xbf{"text": "begins with a byte order mark"}',
        2: b'{"text": "cut',
        3: b"",
        4: b'{"body": "other key"}',
        5: b'{"text": 5}',
        6: b'["text"]',
        7: b'{"text": "\xff"}',
        8: b'{"text": "\\ud800"}',
        9: b'{"text": " \\n "}',
        10: b'{"text": "good", "id": [1, 2]}',
        11: b'{"text": ' + b"[" * 100_000,
        12: b'{"text": ""}',
    }
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines.values()))
    with caplog.at_level("WARNING", logger="meditron_train"):
        meta = tokenize([tmp_path / "in.jsonl"], tmp_path / "out", options)
    assert (meta["documents"], meta["bad_lines"], meta["empty_documents"]) == (2, 7, 2)
    assert read_ids(tmp_path / "out", [0, 1]) == {0: None, 1: [1, 2]}
    for line, reason in (
        (2, "not JSON"),
        (4, "no key 'text'; it has 'body'"),
        (5, "'text' is not text but int"),
        (6, "a JSON object is needed, not list"),
        (7, "not UTF-8"),
        (8, "not valid Unicode"),
        (11, "not JSON"),
    ):
        assert f"in.jsonl, line {line}: " in caplog.text
        assert reason in caplog.text


def test_strict_stops_at_the_first_bad_line(tmp_path: Path, source: Path, options: TokenizeOptions) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    lines[150] = b"{\n"
    source.write_bytes(b"".join(lines))
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"in\.jsonl, line 151: not JSON"):
            tokenize([source], tmp_path / "out", options, strict=True, workers=workers)
    assert not (tmp_path / "out.idx").exists()
    assert tokenize([source], tmp_path / "out", options)["documents"] == 299


def test_parquet_rows(tmp_path: Path, options: TokenizeOptions) -> None:
    table = {"body": ["one", None, "", "two"]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=r"no column 'text'; it has 'body': use --text-key"):
        tokenize([tmp_path / "in.parquet"], tmp_path / "out", options)
    meta = tokenize([tmp_path / "in.parquet"], tmp_path / "out", replace(options, text_key="body"))
    assert (meta["documents"], meta["bad_lines"], meta["empty_documents"]) == (2, 1, 1)
    assert not (tmp_path / "out.ids.jsonl").exists()


@pytest.mark.parametrize("packed", mostly_long(["", ".gz"], ""))
def test_text_files(tmp_path: Path, options: TokenizeOptions, packed: str) -> None:
    """A line or a file is a document; a line break at its end belongs to neither."""
    content = "one fever\r\n\n[1]\n\u00e9t\u00e9".encode()
    path = tmp_path / f"in.txt{packed}"
    path.write_bytes(gzip.compress(content) if packed else content)
    tokenizer = load_tokenizer(options.tokenizer)
    for txt, texts in (
        ("line", ["one fever", "[1]", "\u00e9t\u00e9"]),
        ("file", ["one fever\r\n\n[1]\n\u00e9t\u00e9"]),
    ):
        tokenize([path], tmp_path / txt, replace(options, txt=txt), workers=2 if packed else 1)
        dataset = IndexedDataset(tmp_path / txt)
        assert [dataset.document(i).tolist() for i in range(len(dataset))] == [
            tokenizer.encode(t) for t in texts
        ]


@pytest.mark.parametrize(
    "settings, begins",
    [
        ({"bos_token": "<|begin|>"}, True),
        ({"bos_token": None}, False),
        ({"bos_token": "<|begin|>", "add_bos_token": False}, False),
    ],
)
def test_bos_is_put_where_the_tokenizer_puts_it(
    tmp_path: Path, settings: dict[str, object], begins: bool
) -> None:
    byte_level(tmp_path / "tokenizer", **settings)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text('{"text": "fever"}\n')
    meta = tokenize([tmp_path / "in.jsonl"], tmp_path / "out", TokenizeOptions(str(tmp_path / "tokenizer")))
    document = IndexedDataset(tmp_path / "out").document(0).tolist()
    assert meta["bos"] is begins
    assert document == tokenizer.encode("fever", bos=begins)
    if begins:
        assert document[0] == tokenizer.bos_id


def test_added_tokens_are_used_as_transformers_uses_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_level(tmp_path / "tokenizer")
    published = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    base = load_tokenizer(tmp_path / "tokenizer")
    published.add_tokens(["HbA1c"])
    published.save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    text = "dose of HbA1c and <|end|>"
    want = published(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text, bos=False, eos=False) == want
    assert base.vocab_size in want
    assert tokenizer.eos_id not in want
    assert tokenizer.fingerprint != base.fingerprint


def test_special_tokens_and_no_bos_eos(tmp_path: Path, options: TokenizeOptions) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fever[bib]pain"}\n')
    chosen = replace(options, special_tokens=("[bib]",), bos=False, eos=False)
    meta = tokenize([tmp_path / "in.jsonl"], tmp_path / "out", chosen)
    document = IndexedDataset(tmp_path / "out").document(0).tolist()
    assert document == load_tokenizer(options.tokenizer, ["[bib]"]).encode("fever[bib]pain", False, False)
    assert document.count(400) == 1
    assert (meta["special_tokens"], meta["bos"], meta["tokenizer"]["vocab_size"]) == (["[bib]"], False, 401)


class Killed(Exception):
    pass


def stop_at_chunk(monkeypatch: pytest.MonkeyPatch, number: int) -> list[object]:
    """Kill tokenization at its `number`-th chunk; the list holds the chunks so far."""
    update, chunks = tokenize_module._ProgressBar.update, []

    def update_or_stop(bar: object, chunk: object) -> None:
        update(bar, chunk)
        chunks.append(chunk)
        if len(chunks) == number:
            raise Killed

    monkeypatch.setattr(tokenize_module._ProgressBar, "update", update_or_stop)
    return chunks


@pytest.mark.parametrize("workers", mostly_long([1, 2], 1))
def test_an_interrupted_run_is_continued(
    tmp_path: Path, source: Path, options: TokenizeOptions, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    lines[3] = b"bad\n"  # is counted once, though it is met before the interruption
    source.write_bytes(b"".join(lines))
    tokenize([source, source], tmp_path / "whole", options)
    calls = stop_at_chunk(monkeypatch, 9)
    with pytest.raises(Killed):
        tokenize([source, source], tmp_path / "out", options, workers=workers, save_interval_s=0)
    work = tmp_path / "out.tokenizing"
    assert json.loads((work / "state.json").read_text())["progress"]["num_chunks"] == 9
    for name in ("bin", "sizes", "ids.jsonl"):  # written but not yet counted when the machine went down
        with open(work / name, "ab") as file:
            file.write(b"torn")
    calls.clear()
    calls.extend([None] * 100)
    tokenize([source, source], tmp_path / "out", options, workers=workers)
    num_chunks = len(calls) - 100
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    calls[:] = [None] * 100
    tokenize([source, source], tmp_path / "again", options)
    assert len(calls) - 100 == num_chunks + 9  # nothing was done twice


def test_two_do_not_write_the_same_dataset(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, refused = tokenize_module._ProgressBar.update, []

    def update_while_another_tries(bar: object, chunk: object) -> None:
        update(bar, chunk)
        with pytest.raises(UserError, match="another process is tokenizing") as caught:
            tokenize([source], tmp_path / "out", options)
        refused.append(caught)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module._ProgressBar, "update", update_while_another_tries)
        tokenize([source], tmp_path / "out", options)
    assert refused
    tokenize([source], tmp_path / "whole", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.long
def test_kill_9_while_running(tmp_path: Path, options: TokenizeOptions, corpus_lines: list[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_lines * 20))
    script = (
        "import sys\n"
        "from meditron_train.data.tokenizing.encode import TokenizeOptions\n"
        "from meditron_train.data.tokenizing.tokenize import tokenize\n"
        "if __name__ == '__main__':\n"
        "    tokenize([sys.argv[1]], sys.argv[2], TokenizeOptions(sys.argv[3], chunk_bytes=1500), workers=2,"
        " save_interval_s=0)\n"
    )
    (tmp_path / "run.py").write_text(script)
    arguments = [str(source), str(tmp_path / "out"), options.tokenizer]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    state = tmp_path / "out.tokenizing" / "state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state.exists()
    with pytest.raises(UserError, match="another process is tokenizing"):
        tokenize([source], tmp_path / "out", options)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    tokenize([source], tmp_path / "out", options)
    tokenize([source], tmp_path / "whole", options)
    for suffix in ("bin", "idx", "meta.json"):
        whole = Path(f"{tmp_path}/whole.{suffix}").read_bytes()
        assert Path(f"{tmp_path}/out.{suffix}").read_bytes() == whole


def test_an_interrupted_run_with_overwrite_is_continued(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    lines[0] = b"bad\n"
    source.write_bytes(b"".join(lines))
    tokenize([source], tmp_path / "whole", options)
    (tmp_path / "old.jsonl").write_text('{"text": "old"}')
    tokenize([tmp_path / "old.jsonl"], tmp_path / "out", options)
    chunks = stop_at_chunk(monkeypatch, 5)
    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", options, overwrite=True, save_interval_s=0)
    assert IndexedDataset(tmp_path / "out").num_documents == 1  # the old one is whole until the new one is
    chunks.extend([None] * 100)
    tokenize([source], tmp_path / "out", options, overwrite=True)
    num_continued = len(chunks) - 105
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    tokenize([source], tmp_path / "again", options)
    assert len(chunks) - 105 - num_continued == num_continued + 5


def test_strict_does_not_continue_a_run_that_skipped_lines(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_bytes(b"bad\n" + source.read_bytes())

    def stop(bar: object, chunk: object) -> None:
        raise Killed

    monkeypatch.setattr(tokenize_module._ProgressBar, "update", stop)
    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", options, save_interval_s=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="skipped 1 bad lines already, which --strict forbids"):
        tokenize([source], tmp_path / "out", options, strict=True)
    with pytest.raises(UserError, match="line 1: not JSON"):
        tokenize([source], tmp_path / "out", options, strict=True, overwrite=True)
    assert not (tmp_path / "out.tokenizing" / "state.json").exists()


def test_interrupted_while_publishing(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([source], tmp_path / "whole", options)
    rename = os.replace

    def fail_at_the_index(old: Path, new: Path) -> None:
        if str(new).endswith("out.idx"):
            raise Killed
        rename(old, new)

    monkeypatch.setattr(os, "replace", fail_at_the_index)
    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", options)
    assert (tmp_path / "out.bin").exists()
    monkeypatch.undo()
    tokenize([source], tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.tokenizing").exists()


def test_continuing_with_other_settings_is_refused(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(bar: object, chunk: object) -> None:
        raise Killed

    monkeypatch.setattr(tokenize_module._ProgressBar, "update", stop)
    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", options, save_interval_s=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"other settings \(bos: True, now False\)"):
        tokenize([source], tmp_path / "out", replace(options, bos=False))
    source.write_bytes(source.read_bytes() * 2)
    with pytest.raises(UserError, match="the files changed"):
        tokenize([source], tmp_path / "out", options)
    assert tokenize([source], tmp_path / "out", options, overwrite=True)["documents"] == 600


def test_a_finished_dataset_is_kept(tmp_path: Path, source: Path, options: TokenizeOptions) -> None:
    tokenize([source], tmp_path / "out", options)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"already there: .*out\.bin, .*out\.idx\. Use --overwrite"):
        tokenize([source, source], tmp_path / "out", options)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.tokenizing").exists()
    assert tokenize([source, source], tmp_path / "out", options, overwrite=True)["documents"] == 600


def test_full_disk(
    tmp_path: Path, source: Path, options: TokenizeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    tokenize([source], tmp_path / "whole", options)
    monkeypatch.setattr("meditron_train.data.tokenizing.journal.WorkDirectory.append", no_space)
    with pytest.raises(MeditronError, match="the disk is full") as caught:
        tokenize([source], tmp_path / "out", options)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    tokenize([source], tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class TestBadInput:
    def test_files(self, tmp_path: Path, options: TokenizeOptions) -> None:
        with pytest.raises(UserError, match="no files"):
            tokenize([], tmp_path / "out", options)
        with pytest.raises(UserError, match="no such file"):
            tokenize([tmp_path / "in.jsonl"], tmp_path / "out", options)
        (tmp_path / "in.csv").write_text("text")
        with pytest.raises(UserError, match=r"must end in one of \.jsonl"):
            tokenize([tmp_path / "in.csv"], tmp_path / "out", options)
        with pytest.raises(UserError, match="is a directory: name its files"):
            tokenize([tmp_path], tmp_path / "out", options)

    @pytest.mark.parametrize("name", ["in.json", "in.jsonl"])
    @pytest.mark.parametrize("indent", [None, 1])
    def test_a_json_array(
        self, tmp_path: Path, options: TokenizeOptions, name: str, indent: int | None
    ) -> None:
        (tmp_path / name).write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=indent))
        with pytest.raises(UserError, match=r"is one JSON array; .* jq -c '\.\[\]' in"):
            tokenize([tmp_path / name], tmp_path / "out", options)

    def test_a_wrong_text_key_is_one_message(
        self, tmp_path: Path, options: TokenizeOptions, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"body": "x", "id": 1}\n' * 50)
        with pytest.raises(UserError, match=r"no key 'text'; it has 'body', 'id'.*--text-key"):
            tokenize([tmp_path / "in.jsonl"], tmp_path / "out", options)
        assert caplog.text == ""
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    @pytest.mark.parametrize("kind, said", [(pa.binary(), "holds bytes"), (pa.int64(), "holds int64")])
    def test_a_parquet_column_that_is_no_text(
        self, tmp_path: Path, options: TokenizeOptions, kind: pa.DataType, said: str
    ) -> None:
        values = [b"x"] if kind == pa.binary() else [1]
        pq.write_table(pa.table({"text": pa.array(values, kind)}), tmp_path / "in.parquet")
        with pytest.raises(UserError, match=f"'text' {said}, not text"):
            tokenize([tmp_path / "in.parquet"], tmp_path / "out", options)

    def test_no_document(self, tmp_path: Path, options: TokenizeOptions) -> None:
        (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"body": "x"}\n\n')
        with pytest.raises(UserError, match="1 empty, 1 bad lines"):
            tokenize([tmp_path / "in.jsonl"], tmp_path / "out", options)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    @pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet"])
    def test_damaged_file(
        self, tmp_path: Path, source: Path, options: TokenizeOptions, corpus_lines: list[str], name: str
    ) -> None:
        if name.endswith("gz"):
            content = gzip.compress(source.read_bytes())
        elif name.endswith("zst"):
            content = zstandard.compress(source.read_bytes())
        else:
            pq.write_table(pa.table({"text": corpus_lines}), tmp_path / name)
            content = (tmp_path / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"garbage" * 10):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=name):
                tokenize([tmp_path / name], tmp_path / "out", options, overwrite=True)

    def test_workers(self, tmp_path: Path, source: Path, options: TokenizeOptions) -> None:
        with pytest.raises(UserError, match="--workers is 0"):
            tokenize([source], tmp_path / "out", options, workers=0)

    def test_missing_bos(self, tmp_path: Path, source: Path, hugging_face_directory: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes((hugging_face_directory / "tokenizer.json").read_bytes())
        with pytest.raises(UserError, match="--no-bos"):
            tokenize([source], tmp_path / "out", TokenizeOptions(str(tmp_path)))


@pytest.mark.parametrize("workers", mostly_long([1, 2], 1))
def test_a_document_at_which_the_tokenizer_panics_is_named(tmp_path: Path, workers: int) -> None:
    """The Rust library panics, which is no Exception, where a regex takes too many steps."""
    byte_level(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "x" * 60)))
    options = TokenizeOptions(tokenizer=str(tmp_path / "tokenizer"), chunk_bytes=20)
    with pytest.raises(UserError, match=r"in\.jsonl, line 3: the tokenizer in .* retry-limit-in-match over"):
        tokenize([source], tmp_path / "out", options, workers=workers)
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_never_takes_the_place_of_an_input(
    tmp_path: Path, source: Path, options: TokenizeOptions, overwrite: bool
) -> None:
    before = source.read_bytes()
    named = source.rename(tmp_path / "k.ids.jsonl")
    with pytest.raises(UserError, match="which is read: give another --output"):
        tokenize([named], tmp_path / "k", options, overwrite=overwrite)
    assert named.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [named.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_of_a_dataset_counts_as_there(
    tmp_path: Path, source: Path, options: TokenizeOptions, suffix: str
) -> None:
    Path(f"{tmp_path / 'out'}.{suffix}").write_text("somebody's")
    with pytest.raises(UserError, match=f"already there: .*out.{suffix}. Use --overwrite"):
        tokenize([source], tmp_path / "out", options)
    assert Path(f"{tmp_path / 'out'}.{suffix}").read_text() == "somebody's"
