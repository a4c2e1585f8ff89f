from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from meditron_train.config.load import load_config
from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.encode import TokenizeOptions
from meditron_train.data.loader import StepLoader
from meditron_train.data.packed import build_train_dataset
from meditron_train.data.tokenize import tokenize
from meditron_train.data.tokenizer import load_tokenizer
from meditron_train.data.trace import trace_step
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
    dataset = build_train_dataset(config.data, config.train.seq_len)
    schedule = BatchSchedule(config.train.global_batch_size, config.train.batch_ramp)
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


def test_bad_input(run: Path, tmp_path: Path) -> None:
    for step in (0, 21):
        with pytest.raises(UserError, match=rf"Step {step} is not one of this run: it has the steps 1 to 20"):
            trace_step(run, step)
    with pytest.raises(UserError, match="is not a run directory"):
        trace_step(tmp_path, 1)
