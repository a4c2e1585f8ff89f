"""Requests from outside to save or to stop: signals of a batch system, and files a person makes in RUN_DIR.

SIGTERM, SIGUSR1, Ctrl-C or a file RUN_DIR/stop: save after the step in progress, end, and ask to be started again.
A second Ctrl-C ends the process at once.
A file RUN_DIR/save: save after the step in progress and go on.

Signals may reach any rank, files are looked for by one; the loop brings the ranks to one decision.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from meditron_train.errors import Cause, UserError
from meditron_train.files import read_json_object

STOP_SIGNALS = {
    signal.SIGTERM: Cause.TERMINATED,
    signal.SIGUSR1: Cause.TIME_LIMIT,
    signal.SIGINT: Cause.INTERRUPTED,
}
_NAMES = {signal.SIGINT: "Ctrl-C"}


@dataclass(frozen=True)
class StopRequest:
    """Why a rank should stop: the cause for programs, the reason for people ("SIGTERM", "the file RUN_DIR/stop")."""

    cause: Cause
    reason: str


class StopSignals:
    """Catches the signals while its `with` block runs (main thread only), and puts the old handlers back.

    Requests are sticky: the first stays until acknowledge(). A signal only sets a flag, so no step is torn.

    Args:
        run_dir: the run.
        checks_files: look for RUN_DIR/stop and RUN_DIR/save; for one rank only, so that the others spare the
            file system.
    """

    def __init__(self, run_dir: Path, *, checks_files: bool) -> None:
        self._stop_file = Path(run_dir) / "stop"
        self._save_file = Path(run_dir) / "save"
        self._checks_files = checks_files
        self._signal: signal.Signals | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # a job in a shell's background: Ctrl-C is meant for another
            self._old_handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old_handlers.items():
            # None: the handler was not installed from Python, and Python cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old_handlers.clear()

    @property
    def requested(self) -> StopRequest | None:
        """Why this rank should stop, or None."""
        if self._signal is not None:
            return StopRequest(STOP_SIGNALS[self._signal], _NAMES.get(self._signal, self._signal.name))
        if self._checks_files and self._stop_file.exists():
            return StopRequest(_cause_in(self._stop_file), f"the file {self._stop_file}")
        return None

    @property
    def save_requested(self) -> bool:
        """Whether RUN_DIR/save asks for a checkpoint now."""
        return self._checks_files and self._save_file.exists()

    def acknowledge(self, *, stop: bool) -> None:
        """Remove the files that were obeyed, once the checkpoint is published.

        A kill before that leaves the request standing, and the next start is not stopped by an old one.

        Args:
            stop: the run ends now.
        """
        if self._checks_files:
            self._save_file.unlink(missing_ok=True)
            if stop:
                self._stop_file.unlink(missing_ok=True)

    def ignore(self) -> None:
        """Ignore the signals from now on, beyond the `with` block: the run is saved, and a second SIGUSR1 must not kill
        the interpreter on its way out."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._old_handlers.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)
        if number == signal.SIGINT:
            # Not a handler of ours, which could write status.json first: Python runs none while the main thread waits
            # in a collective operation, and the second Ctrl-C has to end that, too.
            signal.signal(number, signal.SIG_DFL)
            # Not by the log, whose lock the interrupted code may hold.
            os.write(
                2, b"Ctrl-C: saving after this step; press it again to end at once, without a checkpoint\n"
            )


def forget_stop_of_job(run_dir: Path) -> None:
    """Remove RUN_DIR/stop where an earlier batch job wrote it, which was ended before its ranks obeyed."""
    stop_file = Path(run_dir) / "stop"
    if _cause_in(stop_file) is not Cause.STOP_FILE:
        stop_file.unlink(missing_ok=True)


def _cause_in(stop_file: Path) -> Cause:
    """A batch job writes JSON with its cause into the file; a person's may hold anything."""
    try:
        return Cause(read_json_object(stop_file)["cause"])
    except (UserError, ValueError, KeyError, TypeError):
        return Cause.STOP_FILE
