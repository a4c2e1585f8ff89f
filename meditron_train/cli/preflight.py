"""`meditron-train preflight`: are the nodes of a job fit to train? Run once per node, by srun."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meditron_train.errors import UserError

if TYPE_CHECKING:
    from meditron_train.config.schema import Config
    from meditron_train.launcher.node_check import NodeFacts
    from meditron_train.parallel.link_check import Links


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
) -> None:
    """Check the nodes of a job before it trains: GPUs, network, clocks, disk, versions.

    Alone it checks this machine; under srun with one task per node, all nodes together. The first node prints a table
    and writes REPORT_DIR/nodes (fit), bad (with reasons), problems (not of a single node), run_dir and report.json.
    Exit codes: 0 all nodes are fit; 1 something is wrong (said by the first node); 2 the configuration is wrong, or a
    file that it names is on no node; 3 not done in time; 4 the first node does not answer.
    """
    clock = _Clock(timeout_s)
    from meditron_train.config.check import check_config
    from meditron_train.config.load import load_config
    from meditron_train.launcher.environment import detect_launcher

    settings = load_config(config, overrides or [])
    launch = detect_launcher()
    if launch.local_world_size != 1:
        raise UserError(
            f"the pre-flight wants one task per node, here are {launch.local_world_size}: srun --ntasks-per-node 1"
        )
    num_ranks = int(os.environ.get("NPROC_PER_NODE", "1"))
    num_train_nodes = int(os.environ.get("TRAIN_NODES") or launch.world_size)
    check_config(settings, None, num_train_nodes * num_ranks, check_files=False)
    clock.end_in_time()

    from meditron_train.launcher.node_check import NodeFacts, examine_node
    from meditron_train.launcher.verdict import bad_nodes, problems_of_the_run
    from meditron_train.parallel.link_check import Links, farewell, measure_links, meet

    nodes = launch.hosts if len(launch.hosts) == launch.world_size else (socket.gethostname(),)
    run_dir = settings.logging.run_dir.absolute()
    missing = _missing_files(settings)
    own = examine_node(nodes[launch.rank], run_dir, num_ranks=num_ranks, missing_files=missing)
    links = Links(None, {}, {})
    if launch.world_size == 1:
        facts = {own.node: own}
    else:
        try:
            store, answers, members = meet(
                launch.rank,
                launch.world_size,
                launch.master_addr,
                launch.master_port,
                own.to_json(),
                fit=not own.all_problems,
                timeout_s=clock.left(_TO_ANSWER if launch.rank == 0 else _TO_HEAR),
            )
        except RuntimeError as error:  # torch's DistError
            typer.echo(f"[{own.node}] no answer from the first node: {str(error).splitlines()[0]}", err=True)
            raise typer.Exit(3 if launch.rank == 0 else 4) from None
        if launch.rank in members:
            links = measure_links(
                store, launch.rank, members, on_gpu=own.num_gpus > 0, timeout_s=clock.left(_TO_HEAR) / 2
            )
        farewell(store, launch.rank, list(answers), timeout_s=5)
        if launch.rank != 0:
            raise typer.Exit(0)  # the first node speaks for all
        facts = {nodes[rank]: NodeFacts.from_json(values) for rank, values in answers.items()}
    problems = problems_of_the_run(facts)
    is_wrong = any(problem in missing for problem in problems)
    if links.failure is not None:  # between nodes that are well by themselves: nobody can be named
        problems.append(f"the network check failed: {links.failure}")
    bad = bad_nodes(
        nodes,
        facts,
        {nodes[rank]: speed for rank, speed in links.best_pair_gb_s.items()},
        {nodes[rank]: skew for rank, skew in links.clock_skew_s.items()},
    )
    _print_table(nodes, facts, links, bad)
    for problem in problems:
        typer.echo(f"on all nodes: {problem}" if problem in own.all_problems else problem)
    if report_dir is not None:
        _write_report(report_dir, settings, nodes, facts, links, bad, problems)
    raise typer.Exit(2 if is_wrong else 1 if bad or problems else 0)


# Shares of the time for the whole pre-flight: until when a node must have answered the first one, and until when the
# others wait for what that says. The rest is for measuring the network.
_TO_ANSWER = 0.75
_TO_HEAR = 0.9
_LEAST_WAIT_S = 5.0  # for the others to find a first node that was late itself


class _Clock:
    """The time since the pre-flight began, out of `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._start = timeout_s, time.monotonic()

    def left(self, share: float) -> float:
        """Seconds until `share` of the time is over."""
        return max(_LEAST_WAIT_S, self._start + share * self._timeout_s - time.monotonic())

    def end_in_time(self) -> None:
        """A node whose driver hangs cannot be waited for: end this process whatever it does."""

        def end() -> None:
            typer.echo(
                f"[{socket.gethostname()}] the pre-flight took more than {self._timeout_s:.0f} s", err=True
            )
            os._exit(3)

        timer = threading.Timer(self.left(1), end)
        timer.daemon = True
        timer.start()


def _missing_files(settings: Config) -> list[str]:
    from meditron_train.config.check import missing_files

    try:
        return missing_files(settings)
    except OSError as error:  # a stale mount, a directory that may not be entered
        return [f"cannot read {error.filename}: {error.strerror}"]


def _print_table(
    nodes: tuple[str, ...], facts: dict[str, NodeFacts], links: Links, bad: dict[str, str]
) -> None:
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


def _write_report(
    directory: Path,
    settings: Config,
    nodes: tuple[str, ...],
    facts: dict[str, NodeFacts],
    links: Links,
    bad: dict[str, str],
    problems: list[str],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report = {
        "nodes": {node: facts[node].to_json() for node in facts},
        "bandwidth_gb_s": links.bandwidth_gb_s,
        "clock_skew_s": {nodes[rank]: skew for rank, skew in links.clock_skew_s.items()},
        "best_pair_gb_s": {nodes[rank]: speed for rank, speed in links.best_pair_gb_s.items()},
        "failure": links.failure,
        "bad": bad,
        "problems": problems,
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (directory / "run_dir").write_text(f"{settings.logging.run_dir.absolute()}\n")
    (directory / "bad").write_text("".join(f"{node} {why}\n" for node, why in bad.items()))
    (directory / "problems").write_text("".join(f"{problem}\n" for problem in problems))
    if _is_finished(settings):
        (directory / "finished").touch()
    # Last: it says that the rest is complete.
    (directory / "nodes").write_text("".join(f"{node}\n" for node in nodes if node not in bad))


def _is_finished(settings: Config) -> bool:
    """All steps are done and exported: the next job of a chain has nothing to do."""
    run_dir, export = settings.logging.run_dir, settings.checkpoint.export_hf
    latest = run_dir / "checkpoints" / "latest"
    last = f"step_{settings.train.steps:08d}"
    return (
        latest.is_file() and latest.read_text().strip() == last and (not export or (run_dir / "hf").is_dir())
    )
