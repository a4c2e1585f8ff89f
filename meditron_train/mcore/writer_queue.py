"""The queue through which megatron-core's checkpoint writers report what they wrote.

megatron-core makes it in a process that it *spawns*: that imports the whole program again (seconds per rank), outlives
a killed rank for ever, and dies of the SIGTERM that asks a job to save and stop. Ours is forked, ignores such signals,
and ends with its rank.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import signal
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def _end_with_parent_only() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.cache
def results_queue() -> Any:
    """This process's queue, made when first asked for."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=_end_with_parent_only)
    queue: Any = manager.Queue()
    queue._keeps_alive = manager  # the server ends when its manager is collected
    return queue


def install() -> None:
    """Make megatron-core's writers use `results_queue`."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._get_write_results_queue = results_queue
