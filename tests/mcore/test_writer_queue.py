"""The writers and their queue outlive requests to stop and do not outlive their rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meditron_train.mcore.writer_queue import write_in_processes

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

START_WRITER = """
import os, time
from meditron_train.mcore.writer_queue import write_in_processes
def write(transforms, **arguments):
    print(os.getpid(), flush=True)
    time.sleep(600)
write_in_processes(write, [("a file",)], [])
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


@pytest.mark.long
def test_signals_of_a_batch_system_leave_it_alone():
    process, server = start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(server, number)
    output, _ = process.communicate("go on\n", timeout=60)
    assert output == "{'written': 1}\n" and process.returncode == 0
    assert not lives(server)


@pytest.mark.long
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


def write(transforms, *, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync):
    name, action = write_bucket
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise RuntimeError("something is not installed")
    if action == "wait":
        time.sleep(600)
    results_queue.put((local_proc_idx, OSError(28, "full") if action == "fail" else [name, transforms]))
    count_queue.get()
    count_queue.task_done()


def test_results_come_by_the_number_of_the_file():
    assert write_in_processes(write, [("a", ""), ("b", "")], ["t"]) == {0: ["a", ["t"]], 1: ["b", ["t"]]}


@pytest.mark.parametrize(
    ("action", "message"),
    [("die", "the process that wrote b ended with -9"), ("raise", "not installed"), ("fail", "full")],
)
def test_a_writer_that_dies_is_an_error_at_once(action, message):
    """Also while another writer would take much longer."""
    error = write_in_processes(write, [("a", "wait"), ("b", action)], [])
    assert isinstance(error, Exception) and message in str(error)
