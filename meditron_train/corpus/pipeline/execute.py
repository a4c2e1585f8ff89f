"""Running a stage: datatrove's executors on this machine or on Slurm, watched from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import multiprocess
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from multiprocess.managers import SyncManager

from meditron_train.corpus.declaration import SlurmSection
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.corpus.pipeline.worker import prepare_worker
from meditron_train.errors import MeditronError
from meditron_train.log import get_logger

_log = get_logger(__name__)

_TASKS_PER_WORKER = 8  # so that the last task of a stage is short
_POLL_INTERVAL_S = 0.5
_LOG_INTERVAL_S = 30.0
_DEATH_S = 10.0
_WORKER_MODULES = [f"meditron_train.corpus.pipeline.{name}" for name in ("read", "near", "write")]


@dataclass(frozen=True)
class Execution:
    """Where stages run, and how many tasks at a time. None of it changes what they write."""

    executor: Literal["local", "slurm"] = "local"
    workers: int = 1
    """Tasks at a time; on Slurm slurm.max_parallel says it."""
    tasks: int | None = None
    """datatrove's tasks in each stage; absent: as many as keep the workers busy."""
    slurm: SlurmSection = field(default_factory=SlurmSection)
    show_progress: bool = False


@dataclass(frozen=True)
class Stage:
    """One pipeline over all its pieces of work."""

    name: str
    title: str
    pipeline: list[PipelineStep]
    pieces: int
    """Shards, units or buckets: more tasks than that would have nothing to do."""
    total_documents: int | None = None
    """What the progress counts up to, where it is known."""
    done_share: Callable[[], float] | None = None
    """Share of the work that is done, where documents are not counted beforehand."""


def run_stage(stage: Stage, execution: Execution, work: WorkDirectory) -> None:
    """Run all tasks of a stage that are not done yet.

    Raises:
        MeditronError: a task fails or its process dies.
    """
    default = execution.workers * _TASKS_PER_WORKER if execution.executor == "local" else 1000
    tasks = max(1, min(execution.tasks or default, stage.pieces))
    logs = work.logs(stage.name, tasks)
    with _Watch(stage, execution, work) as watch:
        if execution.executor == "slurm":
            _run_on_slurm(stage, execution, logs, tasks)
        else:
            executor = _LocalExecutor(
                pipeline=stage.pipeline,
                tasks=tasks,
                workers=min(execution.workers, tasks),
                logging_dir=str(logs),
            )
            # Imported once for the workers of all stages.
            multiprocess.set_forkserver_preload(["__main__", *_WORKER_MODULES])
            try:
                executor.run()
            except KeyboardInterrupt:
                if watch.dead_worker is None:
                    raise
                raise MeditronError(
                    f"stage {stage.name!r}: the worker process {watch.dead_worker} died (out of memory?). Run the same "
                    "command again with fewer --workers: it continues"
                ) from None


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with a manager process that ends with this one. Its own would outlive a killed build, and with the
    files it inherits keep the lock of the output and the server that forks workers."""

    def run(self) -> Any:
        original = multiprocess.Manager
        multiprocess.Manager = _started_manager
        try:
            return super().run()
        finally:
            multiprocess.Manager = original


def _started_manager() -> Any:
    manager = SyncManager()
    manager.start(prepare_worker)
    return manager


class _SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's, started by this Python, whatever the PATH is on the nodes."""

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        program = f"{sys.executable} -m datatrove.tools.launch_pickled_pipeline"
        script = run_script.replace("launch_pickled_pipeline", program)
        return str(super().get_launch_file_contents(sbatch_args, script))

    def launch_merge_stats(self) -> None:
        """No further job for datatrove's statistics: ours are counted in the stages."""


def _run_on_slurm(stage: Stage, execution: Execution, logs: Path, tasks: int) -> None:
    """Submit a job array and wait for it."""
    slurm = execution.slurm
    executor = _SlurmExecutor(
        pipeline=stage.pipeline,
        tasks=tasks,
        time=slurm.time,
        partition=slurm.partition,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.mem_per_cpu_gb,
        workers=slurm.max_parallel or -1,
        job_name=f"corpus-{stage.name}",
        qos=slurm.qos,
        sbatch_args={**({"account": slurm.account} if slurm.account else {}), **slurm.sbatch_args},
        logging_dir=str(logs.resolve()),
    )
    # A batch job that drives the build passes its own limits on to the jobs it submits, where they contradict theirs.
    inherited = {name: value for name, value in os.environ.items() if _is_inherited(name)}
    for name in inherited:
        del os.environ[name]
    try:
        executor.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise MeditronError(f"stage {stage.name!r}: sbatch failed ({error})") from error
    finally:
        os.environ.update(inherited)
    job, warned = str(executor.job_id), False
    while missing := executor.get_incomplete_ranks():
        queued = _is_queued(job)
        if queued is None and not warned:
            _log.warning("stage %r: squeue fails; asking again until it answers", stage.name)
            warned = True
        if queued is False:
            time.sleep(slurm.poll_interval_s)  # a shared file system may show the last marks late
            missing = executor.get_incomplete_ranks()
            if missing:
                raise MeditronError(
                    f"stage {stage.name!r}: {len(missing)} of {tasks} tasks failed in Slurm job {job}; their output is "
                    f"in {logs / 'slurm_logs'}. Run the same command again: it continues"
                )
            return
        time.sleep(slurm.poll_interval_s)


def _is_inherited(name: str) -> bool:
    return name.startswith(("SLURM_", "SBATCH_")) and name not in ("SLURM_CONF",)


def _is_queued(job: str) -> bool | None:
    """Whether any task of a job array waits or runs; None where Slurm does not answer."""
    jobs = _queued_jobs("--jobs", job)
    # squeue fails for a job that Slurm has forgotten, too: then the list of all jobs lacks it.
    if jobs is None:
        jobs = _queued_jobs()
    return None if jobs is None else job in jobs


def _queued_jobs(*options: str) -> list[str] | None:
    """Ids of the jobs (of arrays, not of their tasks) that squeue names; None where it fails."""
    command = ["squeue", "--noheader", "--format=%F", *options]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else None


class _Watch:
    """Shows how far a stage is, and notices where a worker process has died, for which its pool would wait forever."""

    def __init__(self, stage: Stage, execution: Execution, work: WorkDirectory) -> None:
        self._stage, self._execution = stage, execution
        self._directory = work.progress(stage.name)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._deaths: dict[int, float] = {}
        self.dead_worker: int | None = None

    def __enter__(self) -> _Watch:
        for path in self._directory.glob("*.json"):
            path.unlink(missing_ok=True)
        self._start_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        is_live = self._execution.show_progress and console.is_terminal
        columns = (
            TextColumn("{task.description:>24}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        last_log_s = time.monotonic()
        with Progress(*columns, console=console, disable=not is_live) as bar:
            task = bar.add_task(self._stage.title, total=1.0, rate="")
            while not self._done.wait(_POLL_INTERVAL_S):
                share, rate = self._state()
                bar.update(task, completed=share, rate=f"{rate:,.0f} documents/s")
                if (
                    self._execution.show_progress
                    and not is_live
                    and time.monotonic() - last_log_s > _LOG_INTERVAL_S
                ):
                    last_log_s = time.monotonic()
                    _log.info(
                        "%s: %.0f %%, %.0f documents/s%s",
                        self._stage.title,
                        100 * share,
                        rate,
                        self._left(share),
                    )
                if self.dead_worker is not None:
                    interrupt_main()
                    return
            if self._execution.show_progress:
                bar.update(task, completed=1.0, rate=f"{self._state()[1]:,.0f} documents/s")

    def _left(self, share: float) -> str:
        if share < 0.01:
            return ""
        seconds = (time.monotonic() - self._start_s) * (1 - share) / share
        return f", {seconds / 60:.0f} minutes left"

    def _state(self) -> tuple[float, float]:
        """Share done, and documents per second."""
        documents = 0
        for path in self._directory.glob("*.json"):
            with suppress(OSError, ValueError):
                state: dict[str, Any] = json.loads(path.read_text())
                documents += state["documents"]
                if self._execution.executor == "local" and not state["ended"] and not _is_alive(state["pid"]):
                    self._note_death(state["pid"])
        rate = documents / max(time.monotonic() - self._start_s, 1e-9)
        if self._stage.done_share is not None:
            return self._stage.done_share(), rate
        return documents / max(self._stage.total_documents or 1, 1), rate

    def _note_death(self, pid: int) -> None:
        """A process that died of an error of its task is reported by its pool, in less than this time."""
        since_s = self._deaths.setdefault(pid, time.monotonic())
        if time.monotonic() - since_s > _DEATH_S:
            self.dead_worker = pid


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self").exists()
    return state not in "ZX"
