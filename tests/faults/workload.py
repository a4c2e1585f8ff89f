"""The run that the faults hit: a tiny Llama on invented text, two ranks, bitwise deterministic."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.report.metrics_file import read_metrics


@dataclass(frozen=True)
class Workload:
    """Model and data, made once; `config` writes the configuration of one run on them."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> Workload:
        from meditron_train.data.tokenizing.tokenizer import load_tokenizer
        from tests.train.conftest import VOCAB_SIZE, train_tokenizer, write_corpus
        from tests.train.reference import hf_model

        model = directory / "hf"
        if not (model / "config.json").exists():
            model.mkdir(parents=True)
            train_tokenizer(model)
            vocab_size = load_tokenizer(model).vocab_size
            hf_model(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2).save_pretrained(model)
            write_corpus(directory / "corpus", VOCAB_SIZE, num_documents=400, seed=0)
        return cls(directory)

    def config(self, run_dir: Path, **sections: dict[str, Any]) -> Path:
        """A configuration file beside `run_dir`: 40 steps, a checkpoint every 5."""
        values: dict[str, Any] = {
            "model": {"from": str(self.directory / "hf")},
            "data": {
                "tokenizer": str(self.directory / "hf"),
                "train": [{"name": "corpus", "path": str(self.directory / "corpus")}],
            },
            "optimizer": {"lr": 3.0e-3, "min_lr": 1.0e-4},
            "schedule": {"warmup_steps": 3},
            "train": {
                "steps": 40,
                "seq_len": 64,
                "micro_batch_size": 1,
                "global_batch_size": 8,
                "precision": "fp32",
                "device": "cpu",
            },
            "checkpoint": {"interval": 5, "keep_last": 3, "export_hf": False},
            "logging": {"run_dir": str(run_dir), "wandb": "disabled", "tensorboard": False},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        path = run_dir.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
        return path


class RunWatch:
    """A run as its directory shows it from outside."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.highest_step = 0  # ever logged, also what was lost and taken again

    def step(self) -> int:
        """The last logged step; 0 before the first."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
            self.highest_step = max(self.highest_step, step)
            return step
        return 0

    def resumed_after(self) -> list[int]:
        """The step after which each start of the run went on."""
        try:
            text = (self.run_dir / "provenance.jsonl").read_text()
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(int(json.loads(line)["launch"]["resumed_after_step"]))
            except (ValueError, KeyError):
                continue
        return found

    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.run_dir)]

    def steps(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.run_dir)]

    def wait_for_step(self, step: int, timeout_s: float = 120, ended=lambda: False) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step() < step:
            if ended():
                raise AssertionError(f"the run ended at step {self.step()}, before step {step}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no step {step} within {timeout_s:.0f} s; the run is at {self.step()}")
            time.sleep(0.02)
