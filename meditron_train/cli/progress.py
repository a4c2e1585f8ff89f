"""How far a command has come, on stderr: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from meditron_train.log import get_logger
from meditron_train.units import format_num_bytes

if TYPE_CHECKING:
    from meditron_train.checkpoint.convert.engine import Progress

_log = get_logger(__name__)

LINE_INTERVAL_S = 60.0


@contextmanager
def progress_bar(verb: str, *, hidden: bool = False) -> Iterator[Progress | None]:
    """Bytes, rate and time left while the block runs.

    Args:
        verb: what is done with the bytes, such as "converting".
        hidden: show nothing.
    """
    if hidden:
        yield None
    elif not sys.stderr.isatty():
        yield _ProgressLines(verb)
    else:
        with _bar(verb) as advance:
            yield advance


class _ProgressLines:
    def __init__(self, verb: str) -> None:
        self._verb, self._num_bytes, self._last_s = verb, 0, time.monotonic()

    def __call__(self, name: str, num_bytes: int, total: int) -> None:
        self._num_bytes += num_bytes
        if time.monotonic() - self._last_s >= LINE_INTERVAL_S:
            self._last_s = time.monotonic()
            done, whole = format_num_bytes(self._num_bytes), format_num_bytes(total)
            _log.info("%s: %s of %s, now %s", self._verb, done, whole, name)


@contextmanager
def _bar(verb: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, num_bytes, total: bar.update(
            task, advance=num_bytes, total=total, description=name
        )
