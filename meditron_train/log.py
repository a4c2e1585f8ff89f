"""Logging: one logger tree, stderr for people, one file per rank for the record.

stdout is never used, so that commands with `--json` can own it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

ROOT_NAME = "meditron_train"

# `extra` of a message that every rank of a run comes to say: only rank 0's reaches the console, all reach the files.
EVERY_RANK = {"is_of_every_rank": True}


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: pass `__name__`. Always a child of "meditron_train"."""
    if name == ROOT_NAME or name.startswith(ROOT_NAME + "."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT_NAME}.{name}")


class _PatientFileHandler(logging.FileHandler):
    """A log file on a disk that may be full: the console says so once, until a line gets through again."""

    _is_failing = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        if self._is_failing and not self._failed:
            self._is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        if not self._is_failing:
            self._is_failing = True  # first: this warning comes back here
            get_logger(__name__).warning(
                "%s cannot be written, the console has the lines: %s", self.baseFilename, error.strerror
            )


def printable(text: str) -> str:
    """The text with escapes for everything but printable characters, line breaks and tabs.

    Names in other people's files must not drive the terminal, nor contain what it cannot encode.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging(rank: int = 0, run_dir: Path | None = None) -> None:
    """Send messages to stderr and, with `run_dir`, to `run_dir/logs/rank_00000.log`.

    stderr gets all messages of rank 0 and the warnings of the others (only errors without `run_dir`). Calling
    it again replaces what the previous call set up.
    """
    root = logging.getLogger(ROOT_NAME)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = _Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", "%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    # Before the run has its directory, the ranks all find the same: rank 0 says it.
    others = logging.ERROR if run_dir is None else logging.WARNING
    console.setLevel(logging.INFO if rank == 0 else others)
    if rank != 0:
        console.addFilter(lambda record: not getattr(record, "is_of_every_rank", False))
    console.setFormatter(formatter)
    root.addHandler(console)
    if run_dir is not None:
        log_file = run_dir / "logs" / f"rank_{rank:05d}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        record = _PatientFileHandler(log_file, encoding="utf-8")
        record.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(record)
