"""The writers and their queue outlive requests to stop and do not outlive their rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = """
import os, sys
from meditron_train import mcore
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
queue = _get_write_results_queue()
queue.put({"written": 1})
print(queue._keeps_alive._process.pid, flush=True)
sys.stdin.readline()
print(queue.get_nowait(), flush=True)
"""

# As megatron-core starts a writer, killed before the queue has sent the number of its file.
START_WRITER = """
import functools, multiprocessing, sys
from meditron_train import mcore
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
context = multiprocessing.get_context("fork")
writer = context.Process(
    target=functools.partial(FileSystemWriterAsync.write_preloaded_data, []),
    kwargs=dict(local_proc_idx=0, write_bucket=("/dev/null", "f", ([], [])), results_queue=context.Queue(),
                count_queue=context.JoinableQueue(), use_fsync=True),
)
writer.start()
print(writer.pid, flush=True)
sys.stdin.readline()
"""


def start(program: str = START) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_signals_of_a_batch_system_leave_it_alone():
    process, server = start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(server, number)
    output, _ = process.communicate("go on\n", timeout=60)
    assert output == "{'written': 1}\n" and process.returncode == 0
    assert not lives(server)


@pytest.mark.parametrize("program", [START, START_WRITER], ids=["queue", "writer"])
def test_a_killed_rank_leaves_nothing(program):
    process, started = start(program)
    assert lives(started)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while lives(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = lives(started)
    if left:
        os.kill(started, signal.SIGKILL)
    assert not left
