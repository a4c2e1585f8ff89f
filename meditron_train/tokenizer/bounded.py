"""Work on tokenizer files that may come from anyone, done in a process with bounded memory and time (`child`)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from meditron_train.errors import MeditronError, UserError
from meditron_train.tokenizer.files import tokenizer_files

# The child's limits. Gemma's 256k tokens (34 MB of files) need 1.1 GB; converting Llama-2's tokenizer.model (0.5 MB)
# in Python takes seconds.
_BASE_BYTES, _BYTES_PER_BYTE = 400 << 20, 48
_BASE_CPU_S, _CPU_S_PER_MB = 4.0, 20.0
_MAX_WALL_S = 600.0
IDLE_S = 30.0  # a run that trains for weeks need not keep the process

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from meditron_train.tokenizer.child import serve; serve(float(sys.argv[2]))"
)


def ask(task: str, directory: Path, *, named: Path | None = None, **arguments: str) -> Any:
    """What the task gives for a directory's tokenizer.

    Args:
        task: of `child`: read, complete, agreement, differs or encode.
        directory: where the tokenizer's files lie.
        named: the directory that messages name, where it is another one.
        arguments: of the task.

    Raises:
        UserError: it cannot be done within the bounds, or the files are not what they must be.
    """
    return _in_child(task, directory, named or directory, arguments)


def _in_child(task: str, directory: Path, named: Path, arguments: dict[str, str]) -> Any:
    num_bytes = sum(path.stat().st_size for path in tokenizer_files(directory).values())
    num_bytes += sum(map(len, arguments.values()))
    max_bytes = _BASE_BYTES + _BYTES_PER_BYTE * num_bytes
    max_cpu_s = _BASE_CPU_S + _CPU_S_PER_MB * num_bytes / 1e6
    limits = {"max_bytes": max_bytes, "max_cpu_s": max_cpu_s}
    request = {"task": task, "directory": str(directory.absolute()), "arguments": arguments, **limits}
    try:
        done = _server(os.getpid()).ask(request)
    except TimeoutError:
        raise UserError(f"{named}: its tokenizer was not read within {_MAX_WALL_S:.0f} s") from None
    if done["exit_code"] in (-signal.SIGXCPU, -signal.SIGKILL):
        raise UserError(f"{named}: reading its tokenizer takes more than {max_cpu_s:.0f} s of processor time")
    try:
        answer = json.loads(done["output"])
    except ValueError:
        last = done["errors"].strip().splitlines()[-1:]
        raise UserError(
            f"{named}: reading its tokenizer needs more than {max_bytes >> 20} MB, or crashes the library that reads "
            f"it (exit code {done['exit_code']}{': ' if last else ''}{''.join(last)[:300]})"
        ) from None
    if "refused" in answer:
        raise UserError(_printable(answer["refused"]))
    if "error" in answer:
        raise UserError(f"{named}: transformers cannot read its tokenizer: {_printable(answer['error'])}")
    return answer["value"]


def _printable(message: str) -> str:
    line = " ".join(message.split())
    shown = "".join(character if character.isprintable() else "?" for character in line)
    return shown if len(shown) <= 500 else shown[:500] + "…"


class _Server:
    """The process that forks a reader for each request. It ends with this one, and when it is idle."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            TimeoutError: no answer within _MAX_WALL_S.
            MeditronError: the process died.
        """
        with self._lock:
            try:
                return self._ask(request)
            except BrokenPipeError:  # it was idle
                self._process = None
                return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = _start_server()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], _MAX_WALL_S)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError
        line = process.stdout.readline()
        if not line:
            if process.wait() == 0:  # idle at the moment of the request
                raise BrokenPipeError
            raise MeditronError(
                f"the process that reads tokenizers ended with {process.returncode}; can `import transformers` run?"
            )
        return dict(json.loads(line))


@lru_cache(maxsize=1)
def _server(pid: int) -> _Server:
    """That of this process: a forked one has its own."""
    return _Server()


def _start_server() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(IDLE_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )
