"""What a model directory's tokenizer means: what transformers' AutoTokenizer makes of its files.

The one exception is a directory with `tokenizer.model` alone, of which transformers 5.x makes other ids than the
model was trained with: that means what sentencepiece makes of it, as for Llama-2, and is read from the files that
`complete` adds to it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from meditron_train.errors import MeditronError, UserError
from meditron_train.tokenizer.complete import missing_files
from meditron_train.tokenizer.files import (
    content_digest,
    has_tokenizer,
    is_sentencepiece_alone,
    tokenizer_files,
)

# The child's limits. Gemma's 256k tokens (34 MB of files) need 1.1 GB; converting Llama-2's tokenizer.model (0.5 MB)
# in Python takes seconds.
_BASE_BYTES, _BYTES_PER_BYTE = 400 << 20, 48
_BASE_CPU_S, _CPU_S_PER_MB = 4.0, 20.0
_MAX_WALL_S = 600.0

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from meditron_train.tokenizer.child import serve; serve()"
)


@dataclass(frozen=True)
class Reading:
    """What transformers makes of a directory's tokenizer.

    Attributes:
        backend: content of the tokenizer.json that it works with; None for a tokenizer written in Python.
        vocabulary: token -> id, added tokens included.
        added_tokens: token -> [id, special, lstrip, rstrip, single_word, normalized].
        ids, decoded: of probe texts, some of them with special and added tokens.
        templates: name -> [source, rendered chats].
    """

    transformers: str
    kind: str
    backend: str | None
    vocabulary: Mapping[str, int]
    added_tokens: Mapping[str, list[Any]]
    named_tokens: Mapping[str, Any]
    settings: Mapping[str, Any]
    ids: Mapping[str, list[int]]
    decoded: Mapping[str, list[str]]
    templates: Mapping[str, list[str]]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.vocabulary.values())

    def id_of(self, name: str) -> int | None:
        """The id of a named token ("bos_token"); None without."""
        token = self.named_tokens.get(name)
        return self.vocabulary.get(token) if isinstance(token, str) else None


def read_tokenizer(directory: str | Path) -> Reading:
    """Read the tokenizer of a directory with transformers, in a process with bounded memory and time.

    Raises:
        UserError: the directory has no tokenizer, or transformers cannot read it within the bounds.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise UserError(f"{directory} has no tokenizer (tokenizer.model or tokenizer.json)")
    return _read(_Input(content_digest(directory), directory))


def open_tokenizer(directory: str | Path) -> Any:
    """transformers' own tokenizer of a directory, with the meaning that `read_tokenizer` gives it; opened only after a
    process with bounds has read its files.

    Raises:
        UserError: as `read_tokenizer`.
    """
    read_tokenizer(directory)
    from transformers import AutoTokenizer

    with _completed(Path(directory)) as whole:
        tokenizer = AutoTokenizer.from_pretrained(whole, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(directory)
    return tokenizer


@dataclass(frozen=True)
class _Input:
    """Directories of the same content are read once."""

    digest: str
    directory: Path = field(compare=False)


@lru_cache(maxsize=8)
def _read(source: _Input) -> Reading:
    with _completed(source.directory) as whole:
        return _read_in_child(whole, source.directory)


@contextmanager
def _completed(directory: Path) -> Iterator[Path]:
    """The directory, or where tokenizer.model stands alone a temporary one with all files that transformers needs."""
    if not is_sentencepiece_alone(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in tokenizer_files(directory).items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(scratch) / name)
        for name, content in missing_files(directory).items():
            (Path(scratch) / name).write_text(json.dumps(content), encoding="utf-8")
        yield Path(scratch)


def _read_in_child(directory: Path, named: Path) -> Reading:
    num_bytes = sum(path.stat().st_size for path in tokenizer_files(directory).values())
    max_bytes = _BASE_BYTES + _BYTES_PER_BYTE * num_bytes
    max_cpu_s = _BASE_CPU_S + _CPU_S_PER_MB * num_bytes / 1e6
    request = {"directory": str(directory.absolute()), "max_bytes": max_bytes, "max_cpu_s": max_cpu_s}
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
    if "error" in answer:
        raise UserError(f"{named}: transformers cannot read its tokenizer: {_printable(answer['error'])}")
    return Reading(**{item.name: answer[item.name] for item in fields(Reading)})


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
        [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )
