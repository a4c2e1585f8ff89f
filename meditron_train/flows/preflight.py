"""Are the nodes of a job fit to train? Each node runs this once, started by srun; the first one judges."""

from __future__ import annotations

import enum
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meditron_train.checkpoint.sharded.store import newest_checkpoint
from meditron_train.config.check import check_config, missing_files
from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.launcher.environment import LaunchEnvironment, detect_launcher
from meditron_train.launcher.node_check import NodeFacts, ProblemKind, examine_node, gpu_health
from meditron_train.launcher.verdict import bad_nodes, problems_of_the_run
from meditron_train.train.base_model import with_a_base
from meditron_train.train.length import resolve_steps, with_steps
from meditron_train.train.life.stop_signals import forget_stop_of_job
from meditron_train.train.saving.finished import is_done

if TYPE_CHECKING:
    from meditron_train.parallel.link_check import Links


class PreflightExit(enum.IntEnum):
    """How the pre-flight of one node ended; launch/node.sh and launch/train.sbatch go by it."""

    FIT = 0
    UNFIT = 1
    """Something is wrong with nodes or with the run's files: the first node says what."""
    WRONG_CONFIG = 2
    """The configuration is wrong, or a file that it names is on no node."""
    TOO_LATE = 3
    NO_FIRST_NODE = 4


class NoAnswer(Exception):
    """The first node cannot be reached; on the first node itself, it could not begin."""


@dataclass(frozen=True)
class Verdict:
    """What the first node says of all.

    Attributes:
        facts: of the nodes that answered.
        bad: node -> why it should not train.
        common: problems that all nodes report: the run's.
        other: problems of no node in particular.
        is_wrong: a file that the configuration names is on no node.
    """

    nodes: tuple[str, ...]
    facts: dict[str, NodeFacts]
    links: Links
    bad: dict[str, str]
    common: tuple[str, ...]
    other: tuple[str, ...]
    is_wrong: bool

    @property
    def problems(self) -> tuple[str, ...]:
        return self.common + self.other

    @property
    def exit_code(self) -> PreflightExit:
        if self.is_wrong:
            return PreflightExit.WRONG_CONFIG
        return PreflightExit.UNFIT if self.bad or self.problems else PreflightExit.FIT


def load_and_check(config: Path, overrides: Sequence[str]) -> tuple[Config, LaunchEnvironment]:
    """The configuration, checked for the ranks that are to train, and this node's place among the nodes.

    Raises:
        UserError: the configuration is wrong, or more than one task runs on a node.
    """
    settings = with_steps(load_config(config, list(overrides)), None)
    launch = detect_launcher()
    if launch.local_world_size != 1:
        raise UserError(
            f"the pre-flight wants one task per node, here are {launch.local_world_size}: srun --ntasks-per-node 1"
        )
    num_train_nodes = int(os.environ.get("TRAIN_NODES") or launch.world_size)
    check_config(settings, None, num_train_nodes * _ranks_per_node(), check_files=False)
    return settings, launch


def examine_nodes(settings: Config, launch: LaunchEnvironment, clock: Clock) -> Verdict | None:
    """Examine this node, and all of them together; the verdict on the first node, None on the others.

    Raises:
        NoAnswer: the first node does not come.
    """
    from meditron_train.parallel.link_check import Links, exchange_facts, farewell, measure_links

    nodes = launch.hosts if len(launch.hosts) == launch.world_size else (socket.gethostname(),)
    own = examine_node(
        nodes[launch.rank],
        settings.logging.run_dir.absolute(),
        num_ranks=_ranks_per_node(),
        missing_files=_missing_files(settings),
    )
    links = Links(None, {}, {})
    if launch.world_size == 1:
        facts = {own.node: own}
    else:
        try:
            store, answers, members = exchange_facts(
                launch.rank,
                launch.world_size,
                launch.master_addr,
                launch.master_port,
                own.to_json(),
                fit=not own.all_problems,
                timeout_s=clock.left(_TO_ANSWER if launch.rank == 0 else _TO_HEAR),
            )
        except RuntimeError as error:  # torch's DistError
            raise NoAnswer(
                f"[{own.node}] no answer from the first node: {str(error).splitlines()[0]}"
            ) from None
        if launch.rank in members:
            links = measure_links(
                store, launch.rank, members, on_gpu=own.num_gpus > 0, timeout_s=clock.left(_TO_HEAR) / 2
            )
        farewell(store, launch.rank, list(answers), timeout_s=5)
        if launch.rank != 0:
            return None  # the first node speaks for all
        facts = {nodes[rank]: NodeFacts.from_json(values) for rank, values in answers.items()}
    return _judge(nodes, facts, links)


def _judge(nodes: tuple[str, ...], facts: dict[str, NodeFacts], links: Links) -> Verdict:
    common = problems_of_the_run(facts)
    is_wrong = any(problem.kind is ProblemKind.MISSING_FILE for problem in common)
    # Between nodes that are healthy by themselves: no node can be named.
    other = () if links.failure is None else (f"the network check failed: {links.failure}",)
    bad = bad_nodes(
        nodes,
        facts,
        {nodes[rank]: speed for rank, speed in links.best_pair_gb_s.items()},
        {nodes[rank]: skew for rank, skew in links.clock_skew_s.items()},
    )
    return Verdict(nodes, facts, links, bad, tuple(problem.text for problem in common), other, is_wrong)


# Shares of the time for the whole pre-flight: until when a node must have answered the first one, and until when the
# others wait for what that says. The rest is for measuring the network.
_TO_ANSWER = 0.75
_TO_HEAR = 0.9
_LEAST_WAIT_S = 5.0  # for the others to find a first node that was late itself


class Clock:
    """The time since the pre-flight began, out of `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._start = timeout_s, time.monotonic()

    def left(self, share: float) -> float:
        """Seconds until `share` of the time is over."""
        return max(_LEAST_WAIT_S, self._start + share * self._timeout_s - time.monotonic())

    def end_in_time(self) -> None:
        """A node whose driver hangs cannot be waited for: end this process whatever it does."""

        def end() -> None:
            print(
                f"[{socket.gethostname()}] the pre-flight took more than {self._timeout_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            os._exit(PreflightExit.TOO_LATE)

        timer = threading.Timer(self.left(1), end)
        timer.daemon = True
        timer.start()


def _missing_files(settings: Config) -> list[str]:
    try:
        return missing_files(with_a_base(settings))
    except OSError as error:  # a stale mount, a directory that may not be entered
        return [f"cannot read {error.filename}: {error.strerror}"]


def write_report(directory: Path, settings: Config, verdict: Verdict, from_step: int | None = None) -> None:
    """Write what launch/train.sbatch goes by: nodes, bad, problems, run_dir, finished; and report.json for people.

    A stop request of an earlier job, which was ended before its ranks obeyed, is removed.

    Args:
        from_step: the step that the run is to go back to: whether there is something to do is for its ranks to find.
    """
    directory.mkdir(parents=True, exist_ok=True)
    forget_stop_of_job(settings.logging.run_dir)
    nodes, links = verdict.nodes, verdict.links
    report = {
        "nodes": {node: facts.to_json() for node, facts in verdict.facts.items()},
        "bandwidth_gb_s": links.bandwidth_gb_s,
        "clock_skew_s": {nodes[rank]: skew for rank, skew in links.clock_skew_s.items()},
        "best_pair_gb_s": {nodes[rank]: speed for rank, speed in links.best_pair_gb_s.items()},
        "failure": links.failure,
        "bad": verdict.bad,
        "problems": verdict.problems,
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (directory / "run_dir").write_text(f"{settings.logging.run_dir.absolute()}\n")
    (directory / "bad").write_text("".join(f"{node} {why}\n" for node, why in verdict.bad.items()))
    (directory / "problems").write_text("".join(f"{problem}\n" for problem in verdict.problems))
    if from_step is None and _is_finished(settings):
        (directory / "finished").touch()
    # Last: it says that the rest is complete.
    (directory / "nodes").write_text("".join(f"{node}\n" for node in nodes if node not in verdict.bad))


def _ranks_per_node() -> int:
    """What launch/node.sh says, else as it would: a rank for each GPU, one without."""
    return int(os.environ.get("NPROC_PER_NODE") or len(gpu_health([])[0]) or 1)


def _is_finished(settings: Config) -> bool:
    """All steps are done and exported: the next job of a chain has nothing to do."""
    run_dir = settings.logging.run_dir
    try:
        newest = newest_checkpoint(run_dir / "checkpoints")
        if newest is None:
            return False  # without a look at the data, which the length may need
        settings, _ = resolve_steps(settings)
        return settings.knows_steps and is_done(run_dir, settings, newest)
    except (UserError, OSError):
        return False  # data or checkpoints cannot be read: the start of the run says what is wrong with them
