"""`meditron-train preflight`: are the nodes of a job fit to train? Run once per node, by srun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meditron_train.flows.preflight import Verdict


def preflight(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace those of the file.", metavar="[section.field=value]..."),
    ] = None,
    report_dir: Annotated[
        Path | None, typer.Option("--report-dir", help="Where the first node writes the verdict.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for all of it.")] = 60.0,
    from_step: Annotated[
        int | None,
        typer.Option("--from-step", min=1, help="As of `train`: a run that goes back is not finished."),
    ] = None,
) -> None:
    """Check the nodes of a job before it trains: GPUs, network, clocks, disk, versions.

    Alone it checks this machine; under srun with one task per node, all nodes together. The first node prints a table
    and writes REPORT_DIR/nodes (fit), bad (with reasons), problems (not of a single node), run_dir and report.json.
    Exit codes: 0 all nodes are fit; 1 something is wrong (said by the first node); 2 the configuration is wrong, or a
    file that it names is on no node; 3 not done in time; 4 the first node does not answer.

    \b
    Examples:
      meditron-train preflight configs/llama2-7b.yaml
      srun --ntasks-per-node 1 meditron-train preflight configs/llama2-7b.yaml
    """
    from meditron_train.flows import preflight as flow

    clock = flow.Clock(timeout_s)
    settings, launch = flow.load_and_check(config, overrides or [])
    clock.end_in_time()
    try:
        verdict = flow.examine_nodes(settings, launch, clock)
    except flow.NoAnswer as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(
            flow.PreflightExit.TOO_LATE if launch.rank == 0 else flow.PreflightExit.NO_FIRST_NODE
        ) from None
    if verdict is None:
        return
    _print_table(verdict)
    for problem in verdict.common:
        typer.echo(f"on all nodes: {problem}")
    for problem in verdict.other:
        typer.echo(problem)
    if report_dir is not None:
        flow.write_report(report_dir, settings, verdict, from_step)
    raise typer.Exit(verdict.exit_code)


def _print_table(verdict: Verdict) -> None:
    nodes, facts, links, bad = verdict.nodes, verdict.facts, verdict.links, verdict.bad

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    width = max(6, *(len(node) for node in nodes))
    columns = ("GPUs", "TFLOP/s", "in node", "network", "clock", "disk", "shm")
    units = ("", "", "GB/s", "GB/s", "s", "GiB", "GiB")
    for first, rest in (("node", columns), ("", units)):
        typer.echo("  ".join([f"{first:{width}}", *(f"{word:>8}" for word in rest)]))
    for rank, node in enumerate(nodes):
        known = facts.get(node)
        cells = [
            f"{known.num_gpus if known else '-':>8}",
            f"{number(known.matmul_tflops if known else None, '.2f'):>8}",
            f"{number(known.local_bandwidth_gb_s if known else None, '.1f'):>8}",
            f"{number(links.best_pair_gb_s.get(rank), '.2f'):>8}",
            f"{number(links.clock_skew_s.get(rank), '+.3f'):>8}",
            f"{number(known.free_disk_gib if known else None, '.0f'):>8}",
            f"{number(known.shared_memory_gib if known else None, '.1f'):>8}",
        ]
        typer.echo("  ".join([f"{node:{width}}", *cells]) + (f"  BAD: {bad[node]}" if node in bad else ""))
    if links.bandwidth_gb_s is not None:
        typer.echo(f"all-reduce over all nodes: {links.bandwidth_gb_s:.2f} GB/s")
