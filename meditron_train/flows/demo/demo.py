"""The Meditron experiment in miniature, from an invented world to a report.

A small Llama that has read general text only is trained further on medical text of an invented world. It is asked,
before and after, about facts that the medical text states (taught) and facts that no text states (held out).
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meditron_train.errors import MeditronError, UserError
from meditron_train.flows.demo import stages
from meditron_train.flows.demo.stages import DemoFiles, DemoSizes

MARKER = ".meditron-demo"
GOAL = 0.6  # share of the questions on taught facts that the trained model must answer


def prepare_directory(out: Path) -> None:
    """Make `out` an empty directory with the demo's marker. Only an earlier demo's directory is ever emptied.

    Raises:
        UserError: `out` is a file, or a directory with something else in it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a directory")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(
                f"{out} is not empty and not an earlier demo's: give --out an empty or new directory"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(
        "Made by `meditron-train demo`, which may empty this directory when it runs again.\n"
    )


def run_experiment(files: DemoFiles, sizes: DemoSizes, seed: int) -> dict[str, Any]:
    """All stages in order; returns the report and writes it to report.json."""
    clock = Clock()
    with clock.stage("invent a medical world, write texts and questions"):
        taught, held_out = stages.write_world(files, sizes, seed)
    with clock.stage("train a tokenizer on the general text"):
        stages.train_tokenizer(files, sizes.vocab_size)
    with clock.stage("build a corpus from the texts and tokenize it"):
        counts = stages.build_texts(files, sizes)
    with clock.stage("pretrain a base on general text (2 processes: DP 2)"):
        stages.train_base(files, sizes)
    with clock.stage("continue it on medical text (4 processes: TP 2 × PP 2)"):
        stages.continue_pretraining(files, sizes)
    with clock.stage("check the exported model against the training"):
        checks = stages.check_result(files)
    with clock.stage("ask both models the questions"):
        results = stages.evaluate(files, {"taught": taught, "held-out": held_out})
    report = {
        "seed": seed,
        "tokens": {name: found["tokens"] for name, found in counts.items()},
        "documents": {name: found["documents"] for name, found in counts.items()},
        **results,
        "example": example_command(files.result, taught[0].prompt),
        "checks": checks,
        "seconds": clock.seconds,
        "files": {name: str(path) for name, path in listed_files(files).items()},
    }
    files.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def require_goal(report: dict[str, Any]) -> None:
    """Check that the trained model has learned the taught facts.

    Raises:
        MeditronError: it has not.
    """
    accuracy = report["questions"]["taught"]["after"]["accuracy"]
    if accuracy < GOAL:
        raise MeditronError(
            f"the model answers {accuracy:.0%} of the questions on taught facts; {GOAL:.0%} were expected"
        )


class Clock:
    """Announces each stage and keeps its time in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n[{len(self.seconds) + 1}] {name}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def listed_files(files: DemoFiles) -> dict[str, Path]:
    """What a reader of the result may want to open."""
    return {
        "texts": files.texts,
        "questions": files.questions,
        "corpus, tokenized": files.data,
        "base model (Hugging Face)": files.base,
        "training run": files.continued_run,
        "trained model (Hugging Face)": files.result,
        "this report": files.report,
    }


def example_command(model: Path, prompt: str) -> str:
    """A command that asks the model a question, on one line."""
    words = ["meditron-train", "generate", str(model), "--max-new-tokens", "8", "--prompt"]
    return f'{shlex.join(words)} "{" ".join(prompt.split())}"'
