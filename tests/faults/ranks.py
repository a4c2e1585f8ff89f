"""Faults without a cluster, by the hundred: two ranks as processes, and a supervisor that starts them again.

The supervisor does what torchrun and launch/train.sbatch do together: when one rank ends badly it ends the other, and
starts both again as long as the run is not done. Ranks are forked from a process that has imported torch already.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.distributed import fork_server, free_port
from tests.faults.outcome import Outcome, compare
from tests.faults.workload import RunWatch, Workload

STEPS, INTERVAL = 24, 6
WORLD_SIZE = 2
REWORDING = Path(__file__).parents[1] / "rewording"
_MOST_STARTS = 8
_GRACE_S = 1.0  # torchrun gives 30 s; a rank that waits for a dead peer uses them up
QUICK = {"hang_min_s": 4.0, "hang_other_s": 60.0, "replica_check_interval": 1}


def _rank_main(rank: int, port: int, config: str, log: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment)
    if environment.get("PYTHONPATH") == str(
        REWORDING
    ):  # read at the start of Python, which a fork has behind it
        runpy.run_path(str(REWORDING / "sitecustomize.py"))
    sys.argv = ["meditron-train", "train", config]
    from meditron_train.cli.main import main

    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


class SupervisedRun:
    """One run under supervision: `supervise` returns when it is done, or was started too often."""

    def __init__(self, directory: Path, config: Path, run_dir: Path, environment: dict[str, str]) -> None:
        self.directory, self.config, self.environment = directory, config, environment
        self.watch = RunWatch(run_dir)
        self.processes: list[Any] = []
        self.starts: list[list[int | None]] = []  # exit codes of each
        self.fault_time = self.recovery_s = 0.0
        self.fault_step = self.steps_lost = 0
        self.problem = ""  # found by the fault itself
        self.supervised = True
        self.between: Callable[[], None] | None = None  # done once, before the next start

    @property
    def log(self) -> Path:
        return self.directory / "ranks.log"

    def supervise(self) -> None:
        while len(self.starts) < _MOST_STARTS:
            self._start()
            codes = self._wait()
            self.starts.append(codes)
            if codes == [0] * WORLD_SIZE:
                return
            if self.between is not None:
                self.between()
                self.between = None

    def _start(self) -> None:
        port = free_port()
        if self.fault_time and self.starts:
            self.recovery_s = 0.0
            before, highest = len(self.watch.resumed_after()), self.watch.highest_step
            threading.Thread(target=self._note_recovery, args=(before, highest), daemon=True).start()
        self.processes = [
            fork_server().Process(
                target=_rank_main,
                args=(rank, port, str(self.config), str(self.log), self.environment),
                daemon=False,
            )
            for rank in range(WORLD_SIZE)
        ]
        for process in self.processes:
            process.start()

    def _note_recovery(self, starts_before: int, highest: int) -> None:
        """Of the start that begins now: what it takes again, and when it has caught up."""
        has_gone_back = False
        while self.supervised:
            starts = self.watch.resumed_after()
            if len(starts) > starts_before:
                lost, step = highest - starts[starts_before], self.watch.step()
                self.steps_lost = max(self.steps_lost, lost)
                has_gone_back |= (
                    step < highest or lost == 0
                )  # the lost lines are removed a moment after the start
                if has_gone_back and step >= highest:
                    self.recovery_s = time.monotonic() - self.fault_time
                    return
            time.sleep(0.02)

    def _wait(self) -> list[int | None]:
        first_end: float | None = None
        while any(process.is_alive() for process in self.processes):
            step = self.watch.step()
            if self.fault_time and not self.starts and not self.recovery_s and step > self.fault_step:
                self.recovery_s = time.monotonic() - self.fault_time  # unless it has to start again
            ended_badly = any(process.exitcode not in (None, 0) for process in self.processes)
            if ended_badly and first_end is None:
                first_end = time.monotonic()
                for process in self.processes:
                    if process.is_alive():
                        process.terminate()
            if first_end is not None and time.monotonic() - first_end > _GRACE_S:
                self.kill(range(WORLD_SIZE))
            time.sleep(0.02)
        self.watch.step()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    # ---- what faults do -----------------------------------------------------------------------------------------

    def hit(self) -> None:
        """The fault happens now."""
        self.fault_step, self.fault_time = self.watch.step(), time.monotonic()

    def kill(self, ranks: Any, number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def is_writing(self) -> bool:
        with contextlib.suppress(OSError):
            return any(name.endswith(".tmp") for name in os.listdir(self.watch.run_dir / "checkpoints"))
        return False


@dataclass(frozen=True)
class Fault:
    """`act(run, dice)` in a thread beside the first start; `injected` faults are the ranks' own (MEDITRON_INJECT)."""

    name: str
    promise: str
    times: int
    act: Callable[[SupervisedRun, random.Random], None] | None = None
    injected: str = ""
    said: str = ""
    """What the ranks' log must say after it."""
    config: tuple[tuple[str, dict], ...] = ()
    intervals: int = 1
    """Checkpoint intervals that may be lost."""
    on_small_disk: bool = False


def _wait_for_step(run: SupervisedRun, dice: random.Random) -> None:
    step = dice.randrange(1, STEPS - 4)
    deadline = time.monotonic() + 120
    while run.watch.step() < step and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.1))


def kill_one(run: SupervisedRun, dice: random.Random) -> None:
    _wait_for_step(run, dice)
    run.hit()
    run.kill([dice.randrange(WORLD_SIZE)])


def kill_all(run: SupervisedRun, dice: random.Random) -> None:
    _wait_for_step(run, dice)
    run.hit()
    run.kill(range(WORLD_SIZE))


def kill_while_writing(run: SupervisedRun, dice: random.Random) -> None:
    """At a random moment of the checkpoint that is written: half a second covers all of it."""
    which = dice.randrange(1, 4)  # the first, second or third one
    deadline = time.monotonic() + 120
    for _ in range(which):
        while run.is_writing() and time.monotonic() < deadline:
            time.sleep(0.002)
        while not run.is_writing() and time.monotonic() < deadline:
            time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.45))
    run.hit()
    run.kill(dice.choice([[0], [1], [0, 1]]))


def ask(number: int) -> Callable[[SupervisedRun, random.Random], None]:
    def act(run: SupervisedRun, dice: random.Random) -> None:
        _wait_for_step(run, dice)
        run.hit()
        run.kill(dice.choice([[0], [1], [0, 1]]), number)

    return act


def stop_file(run: SupervisedRun, dice: random.Random) -> None:
    _wait_for_step(run, dice)
    run.hit()
    (run.watch.run_dir / "stop").touch()


def freeze(run: SupervisedRun, dice: random.Random) -> None:
    _wait_for_step(run, dice)
    run.hit()
    run.kill([dice.randrange(WORLD_SIZE)], signal.SIGSTOP)


def damage_latest(run: SupervisedRun, dice: random.Random) -> None:
    """Kill the run once it has two checkpoints, and spoil the newest before it starts again."""
    checkpoints = run.watch.run_dir / "checkpoints"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step_*[0-9]"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    kind = dice.choice(["bit", "cut", "gone", "latest"])

    def spoil() -> None:
        newest = sorted(path for path in checkpoints.glob("step_*") if path.name[-1].isdigit())[-1]
        victim = dice.choice(
            sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        )
        content = bytearray(victim.read_bytes())
        if kind == "bit":
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            victim.write_bytes(bytes(content))
        elif kind == "cut":
            victim.write_bytes(bytes(content[: dice.randrange(len(content))]))
        elif kind == "gone":
            victim.unlink()
        else:
            (checkpoints / "latest").write_text("step_0000")

    run.between = spoil
    run.hit()
    run.kill(range(WORLD_SIZE))


def fill_disk(run: SupervisedRun, dice: random.Random) -> None:
    """The disk of the run is full for three seconds or until the run has ended once, whichever is later to be seen."""
    _wait_for_step(run, dice)
    filler = run.watch.run_dir.parent / "filler"
    run.hit()
    with contextlib.suppress(OSError), open(filler, "wb") as file:
        while True:
            file.write(b"\0" * 2**16)
            file.flush()
    run.between = lambda: filler.unlink(missing_ok=True)
    time.sleep(dice.uniform(0.5, 3))
    filler.unlink(missing_ok=True)


def kill_wandb(run: SupervisedRun, dice: random.Random) -> None:
    _wait_for_step(run, dice)
    run.hit()
    num_killed = 0
    for process in psutil.Process(run.processes[0].pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "wandb" in " ".join(process.cmdline()):
                process.kill()
                num_killed += 1
    if not num_killed:
        run.problem = "there was no process of W&B to kill"


WATCHDOG = (("resilience", QUICK),)
FAULTS = (
    Fault("kill -9 of one rank", "the other is ended, both start again", 15, kill_one),
    Fault("kill -9 of all ranks", "start again from the last checkpoint", 5, kill_all),
    Fault(
        "kill -9 while a checkpoint is written",
        "the one before is taken, nothing half is left",
        25,
        kill_while_writing,
    ),
    Fault("SIGTERM at a random moment", "saved, no step lost", 8, ask(signal.SIGTERM), intervals=0),
    Fault("SIGUSR1 at a random moment", "saved, no step lost", 8, ask(signal.SIGUSR1), intervals=0),
    Fault("RUN_DIR/stop at a random moment", "saved, no step lost", 4, stop_file, intervals=0),
    Fault(
        "latest checkpoint damaged",
        "found by its hashes, the one before is taken",
        16,
        damage_latest,
        intervals=2,
    ),
    Fault(
        "disk full",
        "goes on, or ends at the third save that fails; the last checkpoint stays",
        6,
        fill_disk,
        config=WATCHDOG,
        on_small_disk=True,
        intervals=3,
    ),
    Fault(
        "SIGSTOP of one rank",
        "the watchdog names it and ends the run, it starts again",
        4,
        freeze,
        said="hang in .* gives no sign of life",
        config=WATCHDOG,
    ),
    Fault(
        "NaN in the loss, passing",
        "the step is computed again",
        4,
        injected="nan-once@{step}:rank={rank}",
        intervals=0,
    ),
    Fault(
        "bit flip in a weight",
        "found by comparing replicas, from the last checkpoint on",
        6,
        injected="bitflip@{step}:rank={rank}",
        said="differ",
        config=WATCHDOG,
    ),
    Fault("exception in one rank", "both end, start again", 4, injected="crash@{step}:rank={rank}"),
    Fault(
        "a rank hangs in Python",
        "the watchdog ends the run, it starts again",
        3,
        injected="hang@{step}:rank={rank}",
        said="hang in",
        config=WATCHDOG,
    ),
    Fault(
        "W&B's process killed",
        "training does not notice",
        3,
        kill_wandb,
        config=(("logging", {"wandb": "offline"}),),
        intervals=0,
    ),
)


@contextlib.contextmanager
def _small_disk(directory: Path, size: str = "40m"):
    """A file system of its own in memory, which can be full; needs root."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=False)


def sections(fault: Fault) -> dict[str, dict]:
    base: dict[str, dict] = {
        "train": {"steps": STEPS},
        "checkpoint": {"interval": INTERVAL, "export_hf": False},
    }
    for name, values in fault.config:
        base[name] = {**base.get(name, {}), **values}
    return base


def run_undisturbed(workload: Workload, directory: Path) -> list[float]:
    """Losses of the run that nothing happens to."""
    run_dir = directory / "runs" / "undisturbed"
    config = workload.config(run_dir, **sections(Fault("none", "", 1)))
    run = SupervisedRun(directory, config, run_dir, {})
    run.supervise()
    assert run.starts == [[0] * WORLD_SIZE], run.log.read_text()[-4000:]
    return run.watch.losses()


def try_fault(
    fault: Fault,
    seed: str,
    workload: Workload,
    directory: Path,
    undisturbed: list[float],
    *,
    reworded: bool = False,
) -> Outcome:
    """One run, hit once; `reworded`: every message of the ranks says something else."""
    dice = random.Random(seed)
    environment = {"PYTHONPATH": str(REWORDING)} if reworded else {}
    if fault.injected:
        step = dice.randrange(2, STEPS)
        environment["MEDITRON_INJECT"] = fault.injected.format(step=step, rank=dice.randrange(WORLD_SIZE))
    shutil.rmtree(directory, ignore_errors=True)
    with _small_disk(directory) if fault.on_small_disk else contextlib.nullcontext():
        run_dir = directory / "runs" / "tiny"
        config = workload.config(run_dir, **sections(fault))
        run = SupervisedRun(directory, config, run_dir, environment)
        if fault.act is not None:
            threading.Thread(target=fault.act, args=(run, dice), daemon=True).start()
        else:
            run.fault_step, run.fault_time = step - 1, time.monotonic()
        run.supervise()
        time.sleep(0.1)
        run.supervised = False
        last, identical, problem = compare(
            run.watch.steps(), run.watch.losses(), undisturbed, gaps=fault.on_small_disk
        )
        problems = [problem, run.problem]
        if run.is_writing():
            problems.append("an unfinished checkpoint was left")
        if not run.fault_time or (fault.injected and not any(run.watch.run_dir.glob("injected/*"))):
            problems.append("the fault did not happen")
        said = "reworded" if reworded else fault.said
        if not re.search(said, run.log.read_text(errors="replace")):
            problems.append(f"the log does not say {said!r}")
        codes = " ".join(",".join(map(str, codes)) for codes in run.starts)
        return Outcome(
            fault=fault.name,
            where="ranks",
            promise=fault.promise,
            recovery_s=round(run.recovery_s, 1),
            steps_lost=run.steps_lost,
            most_lost=INTERVAL * fault.intervals,
            last_step=last,
            planned_step=STEPS,
            identical=identical,
            starts=len(run.starts),
            problem="; ".join(filter(None, problems)),
            detail=f"seed {seed}; {environment.get('MEDITRON_INJECT', '')}; exit codes {codes}",
        )
