"""A run on the cluster of cluster.py, started as people start it: sbatch launch/train.sbatch."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.outcome import Outcome, compare
from tests.faults.workload import RunWatch
from tests.slurm.cluster import SlurmCluster, run, wait_for

if TYPE_CHECKING:
    from tests.slurm.scenarios import Scenario

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")


def prepare(directory: Path) -> Path:
    """A directory to submit from: with launch/, as the root of a clone has it."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "launch").exists():
        (directory / "launch").symlink_to(REPOSITORY / "launch")
    return directory


class SlurmRun:
    """One run: submitted, watched, hit by a fault, judged."""

    def __init__(
        self,
        cluster: SlurmCluster,
        directory: Path,
        config: Path,
        run_dir: Path,
        interval: int,
        *,
        reworded: bool = False,
    ) -> None:
        """`reworded`: every message of the ranks and of the pre-flight says something else."""
        self.reworded = reworded
        self.cluster, self.directory, self.config = cluster, directory, config
        self.watch, self.interval = RunWatch(run_dir), interval
        self.job_ids: list[str] = []
        self.fault_time = 0.0
        self.fault_step = 0
        self.recovery_s = 0.0
        self.steps_lost = 0
        self._starts_before = 0
        self._observer: threading.Thread | None = None

    def sbatch(self, *options: str, nodes: int = 2, environment: dict[str, str] | None = None) -> str:
        """Submit launch/train.sbatch as it is in the repository; returns the job's id."""
        words = [
            "sbatch",
            "--parsable",
            f"--nodes={nodes}",
            "--gpus-per-node=0",
            "--time=20:00",
            "--signal=B:USR1@60",
        ]
        words += [*options, "launch/train.sbatch", str(self.config)]
        job_id = run(*words, cwd=self.directory, env={**self._environment(), **(environment or {})}).strip()
        self.job_ids.append(job_id)
        return job_id

    def submit(self) -> None:
        """Submit it with `meditron-train submit`."""
        words = [sys.executable, "-m", "meditron_train", "submit", str(self.config), "--nodes", "2"]
        words += ["--gpus-per-node", "0", "--time", "20:00", "--save-time", "60"]
        said = run(*words, cwd=self.directory, env=self._environment())
        match = re.search(r"Submitted job (\d+)", said)
        assert match is not None, said
        self.job_ids.append(match[1])

    def _environment(self) -> dict[str, str]:
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_JOB", "MASTER_"))
        }
        return {
            **variables,
            "OMP_NUM_THREADS": "1",
            "PREFLIGHT_TIMEOUT_S": "150",
            **({"PYTHONPATH": str(REPOSITORY / "tests" / "rewording")} if self.reworded else {}),
        }  # the nodes share a few cores

    @property
    def job_id(self) -> str:
        return self.job_ids[-1]

    def nodes(self) -> list[str]:
        """The nodes of the job as it runs now, rank 0's first."""
        return run("scontrol", "show", "hostnames", self.cluster.job(self.job_id)["NodeList"]).split()

    def output(self) -> str:
        """What the batch script has printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("**/*.out")))

    def wait_for_step(self, step: int) -> None:
        self.watch.wait_for_step(step, 400, ended=lambda: self.cluster.state(self.job_id) in ENDED)

    def wait_for_end(self, timeout_s: float = 900) -> str:
        """Wait until the job has ended for good; its last state."""

        def ended() -> str | None:
            state = self.cluster.state(self.job_id)
            return state if state in ENDED else None

        return str(wait_for(f"job {self.job_id} has ended", ended, timeout_s, 0.3))

    def fault(self) -> None:
        """Called when the fault is injected: from now on recovery and lost steps are measured."""
        self.fault_time, self.fault_step = time.monotonic(), self.watch.step()
        self._starts_before = len(self.watch.resumed_after())
        self._observer = threading.Thread(target=self._observe, daemon=True)
        self._observer.start()

    def _observe(self) -> None:
        highest, resumed, has_gone_back = self.fault_step, False, False
        while time.monotonic() - self.fault_time < 900:
            starts, step = self.watch.resumed_after(), self.watch.step()
            if not resumed and len(starts) > self._starts_before:
                resumed = True
                self.steps_lost = max(0, highest - starts[self._starts_before])
            elif not resumed:
                highest = max(highest, step)
            has_gone_back |= resumed and (step < highest or self.steps_lost == 0)
            if has_gone_back and step >= highest:
                self.recovery_s = time.monotonic() - self.fault_time
                return
            if not resumed and step > self.fault_step and not self.recovery_s:
                self.recovery_s = time.monotonic() - self.fault_time  # unless it has to start again
            time.sleep(0.05)

    def outcome(
        self,
        scenario: Scenario,
        undisturbed: list[float],
        problem: str = "",
        detail: str = "",
    ) -> Outcome:
        last, identical, difference = compare(
            self.watch.steps(), self.watch.losses(), undisturbed, scenario.tolerance
        )
        starts = len(self.watch.resumed_after())
        if starts != scenario.starts:
            difference = f"started {starts} times, not {scenario.starts}; {difference}"
        return Outcome(
            fault=scenario.name,
            where="Slurm",
            promise=scenario.promise,
            recovery_s=round(self.recovery_s, 1),
            steps_lost=self.steps_lost,
            most_lost=self.interval * scenario.intervals,
            last_step=last,
            planned_step=len(undisturbed),
            identical=identical,
            starts=starts,
            problem="; ".join(filter(None, (problem, difference))),
            detail=detail,
        )

    def said(self, pattern: str) -> bool:
        """Whether the batch script's output matches."""
        return re.search(pattern, self.output()) is not None
