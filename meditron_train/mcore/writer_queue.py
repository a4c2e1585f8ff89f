"""The processes that megatron-core starts for writing a checkpoint end with their rank, and with nothing else.

It makes the queue through which the writers report in a process that it *spawns*: that imports the whole program again
(seconds per rank), outlives a killed rank for ever, and dies of the SIGTERM that asks a job to save and stop. Ours is
forked, ignores such signals, and ends with its rank. So do the writers, one for each file: of a rank that is killed as
it starts them, one would wait for its first word for ever, and hold all that it inherited, the run's lock among it.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_kept_alive: list[Any] = []


def end_with_parent_only() -> None:
    """In a forked process: no signal but its parent's end ends it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it ended before it could be asked to tell


@functools.cache
def results_queue() -> Any:
    """This process's queue, made when first asked for."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=end_with_parent_only)
    queue: Any = manager.Queue()
    queue._keeps_alive = manager  # the server ends when its manager is collected
    return queue


def forget_results_queue() -> None:
    """In a forked process: its own queue is made at the next use, instead of sharing its parent's."""
    if results_queue.cache_info().currsize:
        _kept_alive.append(results_queue())  # the parent's server is not this process's to end
    results_queue.cache_clear()


def install() -> None:
    """Make megatron-core's writers use `results_queue`, and end with the process that started them."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._get_write_results_queue = results_queue
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)
    def write_with_parent(*args: Any, **kwargs: Any) -> Any:
        end_with_parent_only()
        return write(*args, **kwargs)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_with_parent)
