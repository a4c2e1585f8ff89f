"""`meditron-train doctor`: what works on this machine, or why a run ended."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meditron_train.errors import ExitCode

if TYPE_CHECKING:
    from meditron_train.flows.doctor import Finding


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", help="Explain how this run ended instead.", metavar="RUN_DIR")
    ] = None,
) -> None:
    """What is installed, built, reachable; what to do about the rest. With --run: why that run ended.

    Exits 0 when training can run, 1 when something it needs is missing; with --run always 0, if there is such a run.

    \b
    Examples:
      meditron-train doctor
      meditron-train doctor --run runs/llama2-7b
    """
    from meditron_train.flows.doctor import examine

    if run is not None:
        _explain_run(run, json_output=json_output)
        return
    findings = examine()
    can_train = not any(finding.blocks_training for finding in findings)
    if json_output:
        report = {"can_train": can_train, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        _print_findings(findings, can_train)
    raise typer.Exit(ExitCode.DONE if can_train else ExitCode.FAILED)


def _explain_run(run_dir: Path, *, json_output: bool) -> None:
    from meditron_train.errors import UserError
    from meditron_train.files import describe_missing_directory
    from meditron_train.log import printable
    from meditron_train.report.diagnosis import diagnose
    from meditron_train.report.status import read_status

    if not run_dir.is_dir():
        raise UserError(f"{describe_missing_directory(run_dir)}; give the logging.run_dir of a run")
    found, status = diagnose(run_dir), read_status(run_dir)
    if json_output:
        print(json.dumps({"run_dir": str(run_dir), **asdict(found), "status": status}, indent=2))
        return
    lines = [found.summary, *(f"  {line}" for line in found.evidence)]
    if status is not None:
        count = len(status["starts"])
        lines.append(f"last checkpoint: {status.get('last_checkpoint') or 'none'}; starts so far: {count}")
        lines += [f"  {start['time']}: {start['why']}" for start in status["starts"][-5:]]
    if found.will_requeue:
        lines.append("The run asks to be started again (RUN_DIR/requeue).")
    if found.advice:
        lines.append(found.advice)
    print(printable("\n".join(lines)))


def _print_findings(findings: list[Finding], can_train: bool) -> None:
    """A table that fits 80 columns, then what to do, a line each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "found", "in use", "what"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        color = "red" if finding.blocks_training else "green" if finding.in_use else "yellow"
        table.add_row(
            f"[{color}]{finding.name}[/]",
            "yes" if finding.found else "no",
            "yes" if finding.in_use else "no",
            escape(finding.detail),
        )
    console = Console()
    console.print(table)
    remedies = [finding for finding in findings if finding.remedy]
    if remedies:
        console.print("\nWhat to do:")
    for finding in remedies:
        console.print(f"  {escape(finding.name)}: {escape(finding.remedy)}", highlight=False)
    if can_train:
        console.print("\n[green]Training can run here.[/]")
    else:
        blocking = ", ".join(finding.name for finding in findings if finding.blocks_training)
        console.print(f"\n[red]Training cannot run here: {escape(blocking)}.[/]")
