"""The processes that megatron-core starts for writing a checkpoint end with their rank, and with nothing else.

It makes the queue through which the writers report in a process that it *spawns*: that imports the whole program again
(seconds per rank), outlives a killed rank forever, and dies of the SIGTERM that asks a job to save and stop. Ours is
forked, ignores such signals, and ends with its rank. So do the writers, one for each file: of a rank that is killed as
it starts them, one would wait for its first word forever, and hold all that it inherited, the run's lock among it.

megatron-core waits for its writers by counting down a queue, so one that dies (killed for its memory, or by an error
outside of its own `try`) is waited for forever, and training hangs. Ours are waited for as processes: one that ends
without its results is an error at once, on this rank, and through megatron-core's own gathering on all.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
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


class _Results:
    """What megatron-core's writer takes for its two queues; its results leave through a pipe."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def put(self, results: tuple[int, Any]) -> None:
        self._sender.send(results[1])

    def get(self) -> None:
        """The writer counts itself down, which is not needed here."""

    def task_done(self) -> None:
        """As above."""


def _write(
    write: Callable[..., None], transforms: Sequence[Any], sender: Connection, **arguments: Any
) -> None:
    """The whole life of a writer."""
    end_with_parent_only()
    results = _Results(sender)
    try:
        write(transforms, results_queue=results, count_queue=results, **arguments)
    except Exception as error:
        sender.send(error)


def write_in_processes(
    write: Callable[..., None],
    buckets: Sequence[tuple[str, Any, Any]],
    transforms: Sequence[Any],
    **arguments: Any,
) -> Mapping[int, Any] | Exception:
    """Write each bucket (its file is its first item) in a forked process by `write`, megatron-core's function
    for one.

    Returns:
        The results by the bucket's number, or the first error; an error ends the other writers.
    """
    context = multiprocessing.get_context("fork")
    writers = {}
    for number, bucket in enumerate(buckets):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(
            target=functools.partial(_write, write, transforms, sender),
            kwargs={"local_proc_idx": number, "write_bucket": bucket, "use_fsync": True, **arguments},
        )
        writer.start()
        sender.close()
        writers[receiver] = (number, writer)
    results: dict[int, Any] = {}
    error: Exception | None = None
    waiting = list(writers)
    while waiting and error is None:
        for ready in wait(waiting):
            assert isinstance(ready, Connection)
            waiting.remove(ready)
            number, writer = writers[ready]
            try:
                results[number] = ready.recv()
            except EOFError:
                writer.join()
                results[number] = RuntimeError(
                    f"the process that wrote {buckets[number][0]} ended with {writer.exitcode}"
                )
            if isinstance(results[number], Exception):
                error = results[number]
    for receiver, (_, writer) in writers.items():
        if error is not None:
            writer.kill()
        writer.join()
        receiver.close()
    return results if error is None else error


def install() -> None:
    """Make megatron-core use `results_queue` and `write_in_processes`."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    filesystem_async._get_write_results_queue = results_queue
    writer_class = filesystem_async.FileSystemWriterAsync

    @filesystem_async._disable_gc()  # as around the function that it replaces: a collection may call CUDA in a fork
    def write_all(transforms: Sequence[Any], use_msc: bool, rank: int, buckets: Any, queue: Any) -> None:
        arguments = {"use_msc": True} if use_msc else {}
        queue.put(write_in_processes(writer_class.write_preloaded_data, buckets, transforms, **arguments))

    writer_class.write_preloaded_data_multiproc = staticmethod(write_all)
