"""What every rank is doing right now, in RUN_DIR/heartbeats/: how peers, and people afterwards, tell who was stuck.

A thread writes each rank's file every few seconds, so a file that grows old means a rank that was stopped, killed, or
whose machine was lost. Ages are those of the files on the shared file system, all by its one clock. `Pulse` is how the
training loop tells the threads what it does; the loop itself never touches these files.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from meditron_train.errors import UserError
from meditron_train.files import read_json_object, replace_text

HEARTBEATS_NAME = "heartbeats"

# Where a main thread waits for other ranks, as opposed to keeping them waiting.
_COLLECTIVE_FILES = ("torch/distributed/", "p2p_communication.py")
_OWN_FILES = ("meditron_train/", "megatron/core/")
_MAX_REMEMBERED_STEPS = 50


class Pulse:
    """What the training loop is doing; set by the main thread, read by others.

    Attributes:
        step: last finished step.
        phase: "training step", "waiting for data", or, outside steps, "starting", "validation", "saving" ...
        since: monotonic seconds at which the last step was finished or the phase began, whichever came later.
    """

    STEP_PHASES = ("waiting for data", "training step")

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "starting", time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=_MAX_REMEMBERED_STEPS)

    def enter(self, phase: str) -> None:
        """Begin a phase. The time without a finished step goes on when it is a part of a step after another."""
        if phase not in self.STEP_PHASES or self.phase not in self.STEP_PHASES:
            self.since = time.monotonic()
        self.phase = phase

    def finished_step(self, step: int, seconds: float) -> None:
        self._step_seconds.append(seconds)
        self.step, self.since = step, time.monotonic()

    @property
    def median_step_seconds(self) -> float | None:
        """None before three steps are finished: the first ones compile, warm up and fill caches."""
        return statistics.median(self._step_seconds) if len(self._step_seconds) >= 3 else None


@dataclass(frozen=True)
class Heartbeat:
    """One rank's file.

    Attributes:
        step, phase: as in `Pulse`.
        waits_for_others: the main thread stands in a collective operation.
        where: file and line of the main thread, in this package or megatron-core.
        age_s: seconds since it was written, 0 in the file itself.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    waits_for_others: bool
    where: str
    age_s: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on host {self.host}"


class HeartbeatWriter:
    """Writes this rank's heartbeat every `interval_s` in a thread, while its `with` block runs."""

    def __init__(self, run_dir: Path, rank: int, pulse: Pulse, *, interval_s: float) -> None:
        self._path = _path(run_dir, rank)
        self._rank, self._pulse, self._interval_s = rank, pulse, interval_s
        self._main_thread = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def write(self) -> None:
        """Now. Where it cannot be written it grows old, which is all that a reader needs to know."""
        frame = sys._current_frames().get(self._main_thread)
        where, waits = _describe(frame)
        beat = Heartbeat(
            self._rank, socket.gethostname(), os.getpid(), self._pulse.step, self._pulse.phase, waits, where
        )
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            replace_text(self._path, json.dumps(asdict(beat)) + "\n", durable=False, shared=True)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.write()

    def __enter__(self) -> HeartbeatWriter:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """The last heartbeat stays, to show how the run ended."""
        self._ended.set()
        self._thread.join(timeout=5)  # a file system that hangs must not keep the run from ending


def read_heartbeats(run_dir: Path) -> dict[int, Heartbeat]:
    """Rank -> its heartbeat. Ages are relative to the youngest, so that no host's clock matters.

    A file that is torn, or that no rank of ours wrote, is left out.
    """
    found: list[tuple[float, Heartbeat]] = []
    for path in (Path(run_dir) / HEARTBEATS_NAME).glob("rank_*.json"):
        try:
            beat = Heartbeat(**read_json_object(path))
            if _is_sound(beat):
                found.append((path.stat().st_mtime, beat))
        except (OSError, UserError, TypeError):
            continue
    youngest = max((written for written, _ in found), default=0.0)
    return {beat.rank: replace(beat, age_s=youngest - written) for written, beat in found}


def _is_sound(beat: Heartbeat) -> bool:
    numbers, texts = (beat.rank, beat.pid, beat.step), (beat.host, beat.phase, beat.where)
    return all(type(number) is int for number in numbers) and all(isinstance(text, str) for text in texts)


def forget_heartbeats(run_dir: Path) -> None:
    """Remove those of an earlier start, which may have had other ranks."""
    for path in (Path(run_dir) / HEARTBEATS_NAME).glob("*"):
        path.unlink(missing_ok=True)


def stragglers(beats: dict[int, Heartbeat], world_size: int, *, stale_after_s: float) -> list[str]:
    """Who keeps the others waiting, one phrase per rank; empty when all wait in the same place.

    In this order: ranks without a sign of life, ranks behind in steps, ranks that do something else while others wait
    for them.
    """
    silent = [beats[rank] for rank in sorted(beats) if beats[rank].age_s > stale_after_s]
    missing = [f"rank {rank} left no sign of life" for rank in range(world_size) if rank not in beats]
    if silent or missing:
        return missing + [
            f"{beat.name} gives no sign of life for {beat.age_s:.0f} s (stopped, killed, or its machine is lost)"
            for beat in silent
        ]
    newest = max(beat.step for beat in beats.values())
    behind = [beat for beat in beats.values() if beat.step < newest]
    if behind:
        return [f"{beat.name} is at step {beat.step}, others at {newest}: {_doing(beat)}" for beat in behind]
    busy = [beat for beat in beats.values() if not beat.waits_for_others]
    return [f"{beat.name} is busy: {_doing(beat)}" for beat in busy] if len(busy) < len(beats) else []


def _doing(beat: Heartbeat) -> str:
    return f"{beat.phase} at {beat.where}"


def _path(run_dir: Path, rank: int) -> Path:
    return Path(run_dir) / HEARTBEATS_NAME / f"rank_{rank:05d}.json"


def _describe(frame: FrameType | None) -> tuple[str, bool]:
    """(where the innermost frame of our code stands, whether a collective operation is being waited in)."""
    where, waits = "", False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in _COLLECTIVE_FILES)
        if not where and any(part in file for part in _OWN_FILES):
            where = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return where or "unknown", waits
