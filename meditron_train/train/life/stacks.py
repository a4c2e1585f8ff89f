"""`kill -USR2 PID` writes the stacks of all Python threads of a rank, and the rank goes on.

By faulthandler, in C: a handler in Python would wait until the main thread comes back from the collective operation
whose stack is wanted.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meditron_train.log import get_logger

_log = get_logger(__name__)

STACKS_SIGNAL = signal.SIGUSR2
_STDERR = 2


def stacks_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank:05d}.stacks.txt"


def write_stacks_to_stderr() -> None:
    """On SIGUSR2, from now on to the end of the process, which the signal would end otherwise."""
    faulthandler.register(STACKS_SIGNAL, file=_STDERR, all_threads=True)


@contextmanager
def stacks_written_to(path: Path) -> Iterator[None]:
    """On SIGUSR2, stacks are appended to `path` while the block runs, and go to stderr after it."""
    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below, once no signal can reach it)
    except OSError as error:
        _log.warning("on SIGUSR2, stacks go to stderr: %s", error)
        write_stacks_to_stderr()
        yield
        return
    with file:
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            write_stacks_to_stderr()
