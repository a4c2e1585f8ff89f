"""The writers' queue outlives requests to stop and does not outlive its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def start() -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


def test_a_killed_rank_leaves_no_server():
    process, server = start()
    assert lives(server)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while lives(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(server)
