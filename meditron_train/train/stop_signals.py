"""Requests from outside to save or to stop: signals of a batch system, and files a person makes in RUN_DIR.

SIGTERM, SIGUSR1 or a file RUN_DIR/stop: save after the step in progress, end, and ask to be started again.
A file RUN_DIR/save: save after the step in progress and go on.

Signals may reach any rank, files are looked for by one; the loop brings the ranks to one decision.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Catches the signals while its `with` block runs (main thread only), and puts the old handlers back.

    Requests are sticky: the first stays until acknowledge(). A signal only sets a flag, so no step is torn.
    """

    def __init__(self, run_dir: Path, *, checks_files: bool) -> None:
        """`checks_files`: look for RUN_DIR/stop and RUN_DIR/save; for one rank only, the others spare the
        file system."""
        self._stop_file = Path(run_dir) / "stop"
        self._save_file = Path(run_dir) / "save"
        self._checks_files = checks_files
        self._signal_name: str | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old_handlers.items():
            # None: the handler was not installed from Python, and Python cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old_handlers.clear()

    @property
    def requested(self) -> str | None:
        """Why this rank should stop ("SIGTERM", "the file RUN_DIR/stop"), or None."""
        if self._signal_name is not None:
            return self._signal_name
        if self._checks_files and self._stop_file.exists():
            return f"the file {self._stop_file}"
        return None

    @property
    def save_requested(self) -> bool:
        """Whether RUN_DIR/save asks for a checkpoint now."""
        return self._checks_files and self._save_file.exists()

    def acknowledge(self, *, stop: bool) -> None:
        """Remove the files that were obeyed, once the checkpoint is published: a kill before that leaves the
        request standing, and the next start is not stopped by an old one. `stop`: the run ends now."""
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
        if self._signal_name is None:
            self._signal_name = signal.Signals(number).name
