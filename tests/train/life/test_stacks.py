"""SIGUSR2: where every thread of a rank stands, without an end to the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from meditron_train.train.life.stacks import stacks_file
from tests.commands import Command


def test_a_rank_that_trains_tells_its_stacks_and_goes_on(write_config, tmp_path):
    config = write_config(
        train={"steps": 4, "global_batch_size": 2}, validation={"interval": 100, "steps": 1}
    )
    command = Command("train", config, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    stacks = stacks_file(tmp_path / "run", 0)
    deadline = time.monotonic() + 300
    while not stacks.exists() or not stacks.stat().st_size:
        assert command.poll() is None and time.monotonic() < deadline, command.stderr
        if stacks.exists():
            os.kill(command.pid, signal.SIGUSR2)
        time.sleep(0.2)
    assert command.wait(300) == 0, command.stderr
    text = stacks.read_text()
    assert "train/start.py" in text and "most recent call first" in text
    assert "heartbeat.py" in text or "watchdog.py" in text or "train/loop.py" in text


def test_before_there_is_a_run_directory_and_after_it_they_go_to_stderr(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from meditron_train.train.life import stacks\n"
        "me = lambda: os.kill(os.getpid(), signal.SIGUSR2)\n"
        "stacks.write_stacks_to_stderr(); me()\n"
        "with stacks.stacks_written_to(Path(sys.argv[1])): me(); me()\n"
        "with stacks.stacks_written_to(Path('/nowhere/x')): me()\n"
    )
    path = tmp_path / "stacks.txt"
    process = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
    )
    assert process.stderr.count("most recent call first") == 2
    assert path.read_text().count("most recent call first") == 2
