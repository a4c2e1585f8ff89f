"""`meditron-train demo`: the Meditron experiment in miniature.

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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meditron_train.errors import MeditronError, UserError

if TYPE_CHECKING:
    from meditron_train.cli.demo_stages import DemoFiles, DemoSizes

MARKER = ".meditron-demo"
GOAL = 0.6  # share of the questions on taught facts that the trained model must answer


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the demo; an earlier demo there is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the invented world.")] = 0,
) -> None:
    """Run the Meditron experiment in miniature on this machine's CPU: under 5 minutes on 2 cores, no download.

    Exit code 1 when the trained model has not learned the taught facts, or a check of its files fails.
    """
    from meditron_train.cli.demo_stages import DemoFiles, DemoSizes

    prepare_directory(out)
    files = DemoFiles(out)
    report = run_experiment(files, DemoSizes(), seed)
    print_report(report)
    accuracy = report["questions"]["taught"]["after"]["accuracy"]
    if accuracy < GOAL:
        raise MeditronError(
            f"the model answers {accuracy:.0%} of the questions on taught facts; {GOAL:.0%} were expected."
        )


def prepare_directory(out: Path) -> None:
    """Make `out` an empty directory with the demo's marker. Only an earlier demo's directory is ever emptied."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a directory.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(
                f"{out} is not empty and not an earlier demo's: give --out an empty or new directory."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(
        "Made by `meditron-train demo`, which may empty this directory when it runs again.\n"
    )


def run_experiment(files: DemoFiles, sizes: DemoSizes, seed: int) -> dict[str, Any]:
    """All stages in order; returns the report and writes it to report.json."""
    from meditron_train.cli import demo_stages as stages

    clock = Clock()
    with clock.stage("invent a medical world, write texts and questions"):
        taught, held_out = stages.write_world(files, sizes, seed)
    with clock.stage("train a tokenizer on the general text"):
        stages.train_tokenizer(files, sizes.vocab_size)
    with clock.stage("tokenize all texts"):
        metas = stages.tokenize_texts(files)
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
        "tokens": {name: meta["tokens"] for name, meta in metas.items()},
        "documents": {name: meta["documents"] for name, meta in metas.items()},
        **results,
        "example": example_command(files.result, taught[0].prompt),
        "checks": checks,
        "seconds": clock.seconds,
        "files": {name: str(path) for name, path in listed_files(files).items()},
    }
    files.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


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
        "tokenized data": files.data,
        "base model (Hugging Face)": files.base,
        "training run": files.continued_run,
        "trained model (Hugging Face)": files.result,
        "this report": files.report,
    }


def example_command(model: Path, prompt: str) -> str:
    """A command that asks the model a question, on one line."""
    words = ["meditron-train", "generate", str(model), "--max-new-tokens", "8", "--prompt"]
    return f'{shlex.join(words)} "{" ".join(prompt.split())}"'


def print_report(report: dict[str, Any]) -> None:
    """The tables at the end: time by stage, accuracy before and after, where everything lies."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    times = Table("stage", _right("seconds"), title="Time")
    for name, seconds in report["seconds"].items():
        times.add_row(name, f"{seconds:.1f}")
    times.add_row("total", f"{sum(report['seconds'].values()):.1f}", style="bold")
    console.print(times)

    columns = ("", _right("base"), _right("after"), _right("chance"))
    accuracy = Table(*columns, title="What the medical text taught")
    for name, result in report["questions"].items():
        accuracy.add_row(
            f"{result['num_questions']} questions, {name} facts",
            *(_percent_with_interval(result[when]) for when in ("before", "after")),
            f"{result['chance']:.0%}",
        )
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    accuracy.add_row("perplexity, new medical texts", f"{before:,.1f}", f"{after:,.2f}", "")
    console.print(accuracy)
    checks = report["checks"]
    console.print(
        "In brackets: 95 % intervals. Held-out facts stand in no text: nothing but chance is expected of them.",
        f"Checked: the exported model equals the last checkpoint in all {checks['num_equal_tensors']} tensors, bit for "
        f"bit; its loss on {checks['num_validation_tokens']:,} validation tokens is "
        f"{checks['loss_in_transformers']:.6f} in transformers, {checks['loss_in_training']:.6f} in the training.",
        "",
        *(f"{name + ':':30} {path}" for name, path in report["files"].items()),  # plain lines, to be copied
        f"{'ask the trained model:':30} {report['example']}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _percent_with_interval(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} [{low:.0%}–{high:.0%}]"


def _right(header: str) -> Any:
    from rich.table import Column

    return Column(header, justify="right")
