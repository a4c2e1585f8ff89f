"""Ends a rank that hangs: no finished step for many times the median. Says why first, and asks to be started again.

One thread per rank. Steps are synchronous, so when one rank is stuck all stop finishing steps, and all watchdogs come
to their end within moments; each writes the stacks of its own threads (and, on GPUs, NCCL's flight recorder), and the
same diagnosis from everyone's heartbeats. Then the process ends with exit code 85: nothing gentler reaches a thread
that waits in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from meditron_train.config.schema import ResilienceSection
from meditron_train.errors import Cause, ExitCode
from meditron_train.log import get_logger
from meditron_train.report.status import request_requeue
from meditron_train.train.life.heartbeat import HeartbeatWriter, Pulse, read_heartbeats, stragglers
from meditron_train.train.life.stacks import stacks_file

_log = get_logger(__name__)

_SETTLE_S = 2.0  # until all ranks have written the heartbeats that the diagnosis reads
_REPORT_TIMEOUT_S = 60.0  # a hanging file system must not keep a hanging run alive
_BEATS_UNTIL_SILENT = 3


class Watchdog:
    """Watches `pulse` in a thread while its `with` block runs.

    Args:
        end: what to call in the end with the exit code; tests give something milder than os._exit.
    """

    def __init__(
        self,
        pulse: Pulse,
        settings: ResilienceSection,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._pulse, self._settings, self._run_dir = pulse, settings, Path(run_dir)
        self._rank, self._world_size, self._end = rank, world_size, end
        # Several beats fit into the shortest hang, to distinguish a silent rank from a waiting one.
        self._beat_s = min(10.0, settings.hang_min_s / 8, settings.hang_other_s / 8)
        self._poll_s = self._beat_s / 4
        self._heartbeat = HeartbeatWriter(run_dir, rank, pulse, interval_s=self._beat_s)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def limit_s(self) -> float:
        """Seconds without a finished step that are too many, now."""
        median = self._pulse.median_step_seconds
        if self._pulse.phase not in Pulse.STEP_PHASES or median is None:
            return self._settings.hang_other_s
        return max(self._settings.hang_min_s, self._settings.hang_factor * median)

    def __enter__(self) -> Watchdog:
        self._heartbeat.__enter__()
        if self._settings.hang_factor > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._heartbeat.__exit__()

    def _run(self) -> None:
        watched, waited_s, last_s = self._pulse.since, 0.0, time.monotonic()
        while not self._ended.wait(self._poll_s):
            now_s = time.monotonic()
            if self._pulse.since != watched:
                watched, waited_s = self._pulse.since, 0.0
            # Only time in which this process ran: one that was suspended as a whole has not hung.
            waited_s += min(now_s - last_s, 4 * self._poll_s)
            last_s = now_s
            if waited_s > self.limit_s():
                self._fire(waited_s)
                return

    def _fire(self, waited_s: float) -> None:
        reporter = threading.Thread(target=self._report, args=(waited_s,), name="hang-report", daemon=True)
        reporter.start()
        reporter.join(_REPORT_TIMEOUT_S)
        if not self._ended.is_set():
            self._end(ExitCode.REQUEUE)

    def _report(self, waited_s: float) -> None:
        self._write_stacks(waited_s)
        self._write_flight_recorder()
        self._heartbeat.write()
        time.sleep(_SETTLE_S)
        self._heartbeat.write()
        beats = read_heartbeats(self._run_dir)
        found = stragglers(
            beats,
            self._world_size,
            stale_after_s=_BEATS_UNTIL_SILENT * self._beat_s + _SETTLE_S,
        )
        who = "; ".join(found) or "all ranks wait in the same place: the network between them, or a device"
        where = f"{self._pulse.phase} after step {self._pulse.step}"
        reason = f"hang in {where}: nothing was finished for {waited_s:.0f} s; {who}"
        stacks = stacks_file(self._run_dir, self._rank)
        _log.error("%s. Stacks are in %s; asking to be started again", reason, stacks)
        request_requeue(self._run_dir, reason, Cause.HANG)

    def _write_stacks(self, waited_s: float) -> None:
        try:
            with open(stacks_file(self._run_dir, self._rank), "a", encoding="utf-8") as file:
                print(
                    f"\nrank {self._rank}, {self._pulse.phase} after step {self._pulse.step}, "
                    f"no finished step for {waited_s:.0f} s, {time.strftime('%Y-%m-%d %H:%M:%S')}",
                    file=file,
                    flush=True,
                )
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            _log.warning("the stacks could not be written: %s", error)

    def _write_flight_recorder(self) -> None:
        """What NCCL's collectives were doing, as torch's fr_trace reads it; needs TORCH_FR_BUFFER_SIZE > 0."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is None or not torch.cuda.is_available():
            return
        try:
            (self._run_dir / "logs" / f"nccl_trace_rank_{self._rank}").write_bytes(dump())
        except (OSError, RuntimeError) as error:
            _log.warning("NCCL's flight recorder could not be written: %s", error)
