"""`meditron-train` commands as processes of their own, forked from where torch is imported already.

What is the same as with `python -m meditron_train`: arguments, environment, exit code, output, signals. What is not is
the seconds of imports; tests of those, and of the interpreter's start, start an interpreter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.distributed import fork_server


class Command:
    """Like subprocess.Popen of the command, with pipes for its output and a session of its own."""

    def __init__(self, *words: object, environment: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="meditron-command-")
        self._process: Any = fork_server().Process(
            target=_main,
            args=([str(word) for word in words], dict(environment), self._output.name, os.getcwd()),
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """All that it has written so far."""
        return self._read("1")

    @property
    def stderr(self) -> str:
        return self._read("2")

    def _read(self, name: str) -> str:
        path = Path(self._output.name, name)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. What does not end in time is killed: Python waits for it at its own end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("meditron-train", timeout or 0.0, self.stdout, self.stderr)
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until the condition holds; AssertionError where the process ends before, or `timeout` s are over."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"it ended too soon: {self.stderr}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {self.stderr}"
            time.sleep(0.01)
        assert self.poll() is None, f"it ended too soon: {self.stderr}"

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def kill(self) -> None:
        self._process.kill()


def _main(words: list[str], environment: dict[str, str], output: str, directory: str) -> None:
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    # As a terminal starts it: what a shell starts in the background ignores Ctrl-C, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (1, 2):
        file = os.open(Path(output, str(number)), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["meditron-train", *words]
    from meditron_train.cli.main import main

    main()
