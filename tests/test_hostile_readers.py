"""Files of data sets, runs and configurations that anybody may have written are refused with their name, or read: at
once, in little memory, without a traceback. Those of checkpoints are in tests/checkpoint/test_hostile_files.py."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from meditron_train.cli.data import _describe
from meditron_train.config.load import load_config
from meditron_train.config.yaml_file import read_yaml
from meditron_train.corpus.declaration import load_corpus
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.info import dataset_info
from meditron_train.data.meta import FORMAT
from meditron_train.data.tokenizing.readers import (
    BadLineError,
    check_records,
    check_source,
    parse,
    read_chunks,
)
from meditron_train.planner.hardware import read_hardware
from meditron_train.report.diagnosis import diagnose
from meditron_train.report.status import STATUS_FORMAT, RunStatus
from tests.data.indexed_writer import IndexedDatasetWriter
from tests.hostile import attempt_many, changed, check, spoiled
from tests.long import mostly_long

Dice = random.Random
ROOT = Path(__file__).parents[1]

META: dict[str, Any] = {
    "format": FORMAT, "documents": 9, "tokens": 63, "dtype": "uint16", "sha256": "0" * 64,
    "tokenizer": {"directory": "tok", "vocab_size": 400, "fingerprint": "f"}, "special_tokens": ["<a>"],
    "bos": True, "eos": True, "text_key": "text", "id_key": "id", "bad_lines": 0, "empty_documents": 0,
    "sources": [{"path": "a.jsonl", "num_bytes": 9, "documents": 9, "tokens": 63}],
}  # fmt: skip
START = {"time": "2026-01-01T00:00:00+00:00", "why": "first start", "hosts": ["a"], "world_size": 2}
STATUS: dict[str, Any] = {
    "format": STATUS_FORMAT, "run_id": "0123456789abcdef", "state": "running", "step": 3, "steps": 9,
    "last_checkpoint": "step_00000002", "cause": None, "reason": None, "exit_code": None, "hosts": ["a"],
    "world_size": 2, "job_id": None, "pid": 9, "starts": [START, START], "updated": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
FAILURE: dict[str, Any] = {
    "time": 1.5, "rank": 1, "host": "a", "step": 3, "kind": "RuntimeError", "exit_code": 1, "cause": "crashed",
    "message": "NCCL timed out", "traceback": "",
}  # fmt: skip
HARDWARE = {"ours": {"like": "a100-80gb", "power_w": 300, "memory_bytes": 80 << 30}, "slow": {"like": "ours"}}


class Files:
    """Whole files of every form in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prefix = root / "data"
        with IndexedDatasetWriter(self.prefix, "<u2") as writer:
            for number in range(9):
                writer.add_document(np.arange(number + 3))
        self.index = (root / "data.idx").read_bytes()
        self.run = root / "run"
        (self.run / "logs").mkdir(parents=True)
        table = pa.table(
            {
                "text": [f"a text of {n} words\n" for n in range(40)],
                "id": list(range(40)),
                "meta": [{"tags": ["x"] * (n % 3)} for n in range(40)],
            }
        )
        pq.write_table(table, root / "whole.parquet", row_group_size=16)
        self.parquet = (root / "whole.parquet").read_bytes()


def data_meta(files: Files, dice: Dice) -> None:
    path = files.root / "data.meta.json"
    raw = json.dumps(META).encode()
    path.write_bytes(json.dumps(changed(META, dice)).encode() if dice.random() < 0.8 else spoiled(raw, dice))
    check(lambda: _describe(dataset_info(files.prefix)))
    path.unlink()


def read_index(files: Files) -> None:
    dataset = IndexedDataset(files.prefix)
    dataset_info(files.prefix)
    for number in range(min(dataset.num_documents, 100)):
        dataset.document(number).sum()
    assert len(dataset.document_starts) == dataset.num_documents == len(dataset.document_lengths)


def index(files: Files, dice: Dice) -> None:
    """Numbers of the header and of the arrays, of other sizes and signs; or bytes."""
    raw = bytearray(files.index)
    if dice.random() < 0.7:
        num_sequences, num_indices = struct.unpack_from("<QQ", raw, 18)
        pointers = 34 + 4 * num_sequences
        places = [("<Q", 10), ("<B", 17), ("<Q", 18), ("<Q", 26)]
        places += [("<i", 34 + 4 * n) for n in range(num_sequences)]
        places += [("<q", pointers + 8 * n) for n in range(num_sequences + num_indices)]
        for form, place in dice.sample(places, dice.choice((1, 1, 2, 5))):
            odd = dice.choice(
                (0, 1, 2, 3, 7, 9, 10, 255, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**64 - 2, 2**64 - 1)
            )
            size = struct.calcsize(form)
            raw[place : place + size] = odd.to_bytes(8, "little")[:size]
        data = bytes(raw)
    else:
        data = spoiled(bytes(raw), dice)
    path = files.root / "data.idx"
    path.write_bytes(data)
    check(lambda: read_index(files))
    path.write_bytes(files.index)


def read_texts(path: Path) -> None:
    check_source(path)
    check_records(path, partial(parse, text_key="text", id_key=""), "Name the key")
    for chunk in read_chunks(path, 0, ("text", "id"), 1 << 20):
        for record in chunk.records:
            with suppress(BadLineError):
                parse(record, "text", "id")


def parquet(files: Files, dice: Dice) -> None:
    """Bytes of the footer, bytes of the whole file, or a table of columns of other types."""
    path = files.root / "table.parquet"
    what = dice.random()
    if what < 0.4:
        size = 8 + struct.unpack("<I", files.parquet[-8:-4])[0]
        path.write_bytes(files.parquet[:-size] + spoiled(files.parquet[-size:-8], dice) + files.parquet[-8:])
    elif what < 0.7:
        path.write_bytes(spoiled(files.parquet, dice))
    else:
        columns = {name: dice.choice(COLUMNS) for name in dice.sample(["text", "id", "more", ""], 3)}
        pq.write_table(pa.table(columns), path, store_schema=dice.random() < 0.5)
    check(lambda: read_texts(path))


COLUMNS: list[pa.Array] = [
    pa.array(["a", None, "\x1b[31m"]),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array(["a", "b", "a"], pa.large_string()),
    pa.array([b"\xff", b"a", None]),
    pa.array([1, 2**62, None]),
    pa.array([1.5, float("nan"), float("inf")]),
    pa.array([["a"], [], None]),
    pa.array([{"a": 1}, None, {"a": 2}]),
    pa.array([None, None, None]),
    pa.array([2**62, -(2**62), 0], pa.timestamp("ns")),
    pa.array([2**31 - 1, 0, None], pa.date32()),
    pa.array([2**62, 1, None], pa.duration("us")),
    pa.array([True, False, None]),
]


def status(files: Files, dice: Dice) -> None:
    """status.json and what failed, as `doctor --run` and the next start read them."""
    contents = {
        "status.json": STATUS,
        "logs/rank_00001.failure.json": FAILURE,
        "requeue": {"cause": "hang", "reason": "x"},
    }
    chosen = dice.choice(list(contents))
    state = dice.choice(("running", "failed", "stopped", "done", "crashed"))
    for name, content in contents.items():
        whole = {**content, "state": state} if name == "status.json" else content
        if name == "requeue" and name != chosen and dice.random() < 0.7:
            (files.run / name).unlink(missing_ok=True)
        elif name == chosen and dice.random() < 0.2:
            (files.run / name).write_bytes(spoiled(json.dumps(whole).encode(), dice))
        else:
            (files.run / name).write_text(json.dumps(changed(whole, dice) if name == chosen else whole))

    def read() -> None:
        from meditron_train.cli.doctor import _explain_run

        diagnose(files.run)
        _explain_run(files.run, json_output=False)
        RunStatus(files.run, enabled=True).start({"hosts": ["b"], "world_size": 1, "steps": 9})

    check(read)


def yaml_reader(content: dict[str, Any], read: Callable[[Path], object]) -> Callable[[Files, Dice], None]:
    def attempt(files: Files, dice: Dice) -> None:
        path = files.root / "file.yaml"
        what = dice.random()
        if what < 0.6:
            path.write_text(yaml.dump(changed(content, dice), allow_unicode=False))
        elif what < 0.8:
            lines = yaml.safe_dump(content).splitlines(keepends=True)
            at = dice.randrange(len(lines))
            lines.insert(at, dice.choice(YAML_LINES))
            path.write_text("".join(lines))
        else:
            path.write_bytes(spoiled(yaml.safe_dump(content).encode(), dice))
        check(lambda: read(path))

    return attempt


YAML_LINES = [
    "a: &a [*a]\n", "<<: {x: 1}\n", "<<: *nothing\n", "? [1, 2]\n: 3\n", "!!python/object/apply:os.system ['x']\n",
    "a: !!binary x\n", "a: !!set {x, y}\n", "a: !!timestamp 99999-99-99\n", "a: 2001-99-99\n",
    "a: " + "[" * 2000 + "\n", "a: " + "{x: " * 500 + "\n", "&x a: *x\n", "a: 1:30\n", "a: 0o9\n", "a: .inf\n",
    "a: 1e999\n", "a: ${HOME\n", "\t- a\n", "a: ${X:-${Y}}\n", "%YAML 9.9\n", "---\nb: 1\n", "a: '\\x1b[31m'\n",
    'a: "\\ud800"\n', "a: " + "9" * 5000 + "\n", "a: 0x" + "f" * 9000 + "\n", "null: 1\n", "1: 2\n", "a: !!int x\n",
    "a: !!float x\n", "a: !!bool x\n", "a: !!null x\n", "a: !!omap [x]\n", "a: !!pairs [x]\n", "a: !!str [x]\n",
    "a: !!map [x]\n", "a: !!seq {x: 1}\n", "a: 1_0__0\n", "a: =\n",
]  # fmt: skip


def _settings(name: str) -> dict[str, Any]:
    return read_yaml(ROOT / "configs" / name)


READERS: dict[str, Callable[[Files, Dice], None]] = {
    "data meta.json": data_meta,
    ".idx": index,
    "Parquet": parquet,
    "status.json": status,
    "YAML of a run": yaml_reader(_settings("demo.yaml"), load_config),
    "YAML of a corpus": yaml_reader(_settings("corpus/gap-replay.yaml"), load_corpus),
    "YAML of hardware": yaml_reader(HARDWARE, read_hardware),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA2_7B", "CORPUS"):
        monkeypatch.setenv(name, "/nothing")


@pytest.mark.parametrize("times", mostly_long([50, 200], 50))
@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_or_read(files: Files, reader: str, times: int) -> None:
    attempt_many(lambda dice: READERS[reader](files, dice), times, derandomize=True)


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_or_read_2000_times(files: Files, reader: str) -> None:
    attempt_many(lambda dice: READERS[reader](files, dice), 2000, derandomize=False)


def test_the_whole_files_are_read(files: Files, tmp_path: Path) -> None:
    """What is spoiled above is right to begin with, or nothing would be tried but the first check."""
    (tmp_path / "data.meta.json").write_text(json.dumps(META))
    for name in ("data.bin", "data.idx"):
        shutil.copy(files.root / name, tmp_path)
    assert "a.jsonl" in _describe(dataset_info(tmp_path / "data"))
    read_index(files)
    read_texts(files.root / "whole.parquet")
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    assert diagnose(tmp_path).cause == "running_or_killed"
    for content, read in ((HARDWARE, read_hardware), (_settings("corpus/gap-replay.yaml"), load_corpus)):
        (tmp_path / "file.yaml").write_text(yaml.safe_dump(content))
        read(tmp_path / "file.yaml")
