from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from meditron_train.config.load import load_config
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import build_train_dataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.data.trace import read_ids, trace_step
from meditron_train.errors import UserError


@pytest.fixture
def run(tmp_path: Path, sentencepiece_directory: Path, corpus_lines: list[str]) -> Path:
    """A run directory over two tokenized sources, one of them without ids."""
    for name, lines, ids in (("a", corpus_lines[:120], True), ("b", corpus_lines[120:], False)):
        records = [{"text": text} | ({"id": f"{name}-{i}"} if ids else {}) for i, text in enumerate(lines)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenize([path], tmp_path / name, TokenizeOptions(str(sentencepiece_directory)))
    config = {
        "model": {"from": str(tmp_path)},
        "data": {
            "tokenizer": str(sentencepiece_directory),
            "packing": "concat",
            "train": [
                {"name": "with_ids", "path": str(tmp_path / "a"), "weight": 3.0},
                {"name": "without", "path": str(tmp_path / "b"), "weight": 1.0},
            ],
        },
        "train": {
            "steps": 20,
            "seq_len": 64,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "batch_ramp": {"start": 4, "increment": 4, "samples": 12},
        },
    }
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_is_what_the_loader_gave(run: Path, sentencepiece_directory: Path, corpus_lines: list[str]) -> None:
    config = load_config(run / "config.yaml")
    dataset = build_train_dataset(config.data, config.train.seq_len, None)
    schedule = BatchSchedule.of(config.train)
    tokenizer = load_tokenizer(sentencepiece_directory)
    for step in (1, 4, 20):
        found = trace_step(run, step)
        with StepLoader(dataset, schedule, 2, start_step=step) as loader:
            loaded_step, batches = next(loader)
        assert loaded_step == found["step"] == step
        assert found["num_samples"] == sum(len(batch.tokens_T) for batch in batches) // 64
        assert found["first_sample"] == schedule.samples_before(step)
        trained = [
            batch.tokens_T[start:end].tolist()
            for batch in batches
            for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
            if batch.tokens_T[start:end].any()  # not padding
        ]
        traced = []
        for row in found["segments"]:
            lines = corpus_lines[:120] if row["source"] == "with_ids" else corpus_lines[120:]
            ids = tokenizer.encode(lines[row["document"]])
            traced.append(ids[row["start"] : row["start"] + row["length"]])
            assert row["id"] == (f"a-{row['document']}" if row["source"] == "with_ids" else None)
        assert traced == trained


def record(run: Path, fingerprint: str, working_directory: Path) -> None:
    start = {"data_fingerprints": {"train": fingerprint}, "working_directory": str(working_directory)}
    other = {"data_fingerprints": {"train": "0" * 64}, "working_directory": "/nowhere"}
    lines = [json.dumps(other), json.dumps(start), '{"data_fing']  # an earlier start, the last, a torn line
    (run / "provenance.jsonl").write_text("\n".join(lines))


def test_replaced_data_is_refused(run: Path, tmp_path: Path, sentencepiece_directory: Path) -> None:
    fingerprint = trace_step(run, 1)["data_fingerprint"]
    record(run, fingerprint, tmp_path)
    assert trace_step(run, 1)["data_verified"] is True
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "fever and pain " * 400}) + "\n")
    options = TokenizeOptions(str(sentencepiece_directory))
    tokenize([tmp_path / "b.jsonl"], tmp_path / "b", options, overwrite=True)
    with pytest.raises(
        UserError, match=rf"has changed since the run.* has {fingerprint}\. Put back the data"
    ):
        trace_step(run, 1)


def test_without_a_record_the_data_is_not_verified(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="meditron_train"):
        assert trace_step(run, 1)["data_verified"] is False
    assert "does not say which data the run read" in caplog.text


def test_relative_paths_are_those_of_the_run(
    run: Path, tmp_path: Path, sentencepiece_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trace_step(run, 3)
    config = yaml.safe_load((run / "config.yaml").read_text())
    shutil.copytree(sentencepiece_directory, tmp_path / "tokenizer")
    config["data"]["tokenizer"] = "tokenizer"
    for source, name in zip(config["data"]["train"], "ab", strict=True):
        source["path"] = name
    config["data"]["validation"] = [{"name": "other", "path": "a"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    record(run, expected["data_fingerprint"], tmp_path)
    for directory in (tmp_path, run):
        monkeypatch.chdir(directory)
        assert trace_step(run, 3)["segments"] == expected["segments"]


def test_ids_that_json_does_not_have(tmp_path: Path, sentencepiece_directory: Path) -> None:
    ids = ["NaN", "-Infinity", "1e999", '{"a": [NaN]}', "7"]
    lines = [f'{{"id": {number}, "text": "fever"}}\n' for number in ids]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    tokenize([tmp_path / "in.jsonl"], tmp_path / "a", TokenizeOptions(str(sentencepiece_directory)))
    found = read_ids(tmp_path / "a", range(5))
    assert found == {0: "nan", 1: "-inf", 2: "inf", 3: "{'a': [nan]}", 4: 7}
    (tmp_path / "a.ids.jsonl").write_text("NaN\n")  # as earlier versions wrote it
    assert read_ids(tmp_path / "a", [0]) == {0: "NaN"}


def test_bad_input(run: Path, tmp_path: Path) -> None:
    for step in (0, 21):
        with pytest.raises(UserError, match=rf"step {step} is not one of this run: it has the steps 1 to 20"):
            trace_step(run, step)
    with pytest.raises(UserError, match="is not a run directory"):
        trace_step(tmp_path, 1)
