"""The one way in which tests start several ranks: processes on this machine, one thread each, gloo."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

# The fork server imports these once; each rank is then forked from it in milliseconds instead of seconds.
PRELOAD = ["tests.preload"]


@functools.cache
def _readings() -> tempfile.TemporaryDirectory[str]:
    """Where the processes leave what they read of tokenizers for each other; removed with this process."""
    return tempfile.TemporaryDirectory(prefix="meditron-readings-")


@functools.cache
def fork_server() -> Any:
    """The multiprocessing context whose processes are forked from it."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one rank = one thread; inherited by the server
    os.environ["MEDITRON_TEST_READINGS"] = _readings().name
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    """Below the range from which the system takes the ports of connections, as tests run side by side."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank_main(rank: int, world_size: int, port: int, results: Connection, call: bytes) -> None:
    """Send what the function returns, then wait until every rank is done: rank 0 holds the store the others ask."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    try:
        function, args, kwargs = pickle.loads(call)
        results.send_bytes(pickle.dumps(("value", function(rank, world_size, *args, **kwargs))))
        with suppress(EOFError):
            results.recv_bytes()
    except BaseException:  # whatever it was, the test must show it
        results.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        os._exit(1)  # a failed rank must not wait for its peers in destructors


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 180, **kwargs: Any) -> list:
    """Run `function(rank, world_size, *args, **kwargs)` on `world_size` ranks; their return values in rank order.

    `function` is a top-level function and returns something picklable. The first rank to fail ends the others and
    its traceback becomes an AssertionError here.
    """
    context = fork_server()
    port = free_port()
    # Plain pickles: multiprocessing's own would pass each tensor as an open file, of which there can be too many.
    call = pickle.dumps((function, args, kwargs))
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe()
        process = context.Process(
            target=_rank_main, args=(rank, world_size, port, sender, call), daemon=False
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(values) < world_size:
            pending = {pipes[rank]: rank for rank in range(world_size) if rank not in values}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"ranks {sorted(pending.values())} did not finish within {timeout_s} s")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    processes[rank].join(5)
                    raise AssertionError(
                        f"rank {rank} died with exit code {processes[rank].exitcode}"
                    ) from None
                if kind == "error":
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                values[rank] = value
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            process.join(30)  # what a rank holds, such as the lock of a run, is free when the test goes on
    return [values[rank] for rank in range(world_size)]
