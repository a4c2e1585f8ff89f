"""`meditron-train demo`: the Meditron experiment in miniature, with its result as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the demo; an earlier demo there is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the invented world.")] = 0,
) -> None:
    """Run the Meditron experiment in miniature on this machine's CPU: under 5 minutes on 2 cores, no download.

    Exit code 1 when the trained model has not learned the taught facts, or a check of its files fails.

    \b
    Examples:
      meditron-train demo
      meditron-train demo --out /tmp/demo --seed 1
    """
    from meditron_train.flows.demo.demo import prepare_directory, require_goal, run_experiment
    from meditron_train.flows.demo.stages import DemoFiles, DemoSizes

    prepare_directory(out)
    report = run_experiment(DemoFiles(out), DemoSizes(), seed)
    print_report(report)
    require_goal(report)


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
        f"{'the training in charts:':30} meditron-train report {report['files']['training run']}",
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
