"""Weights & Biases in a process of its own, so that nothing it does can hold up or end a training run.

The client library talks to a helper process over a socket; when that helper hangs, both `log` and the
interpreter's exit block. Here the trainer only ever writes to a non-blocking pipe; the other end is this
file, run as a script. What W&B prints goes to RUN_DIR/logs/wandb.log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import secrets
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from meditron_train.log import get_logger
from meditron_train.report.json_lines import decode_line

_log = get_logger(__name__)

_MAX_PENDING_BYTES = 4 * 1024 * 1024  # metrics waiting for a slow or hanging W&B before new ones are left out
_DEFAULT_BASE_URL = "https://api.wandb.ai"


class WandbRun:
    """The trainer's end. Every method returns at once, except close() which waits `timeout_s` at most."""

    def __init__(
        self, run_dir: Path, *, mode: str, project: str, name: str, tags: Sequence[str], config: Mapping
    ) -> None:
        """`mode` is "auto", "online" or "offline"; the run's id is kept in RUN_DIR/wandb/run_id across
        resumes."""
        self._pending = b""
        self._num_dropped = 0
        self._process: subprocess.Popen | None = None
        self._log_file = run_dir / "logs" / "wandb.log"
        if importlib.util.find_spec("wandb") is None:
            _log.warning("W&B is off: the package wandb is not installed")
            return
        try:
            directory = run_dir / "wandb"
            directory.mkdir(parents=True, exist_ok=True)
            self._log_file.parent.mkdir(exist_ok=True)
            settings = {"mode": mode, "project": project, "name": name, "tags": list(tags)}
            settings["id"] = _run_id(directory / "run_id")
            settings_file = directory / "settings.json"
            settings_file.write_text(
                json.dumps({**settings, "dir": str(run_dir), "config": config}, default=str)
            )
            package_parent = str(Path(__file__).resolve().parents[2])
            python_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
            with open(self._log_file, "ab") as log_file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "meditron_train.report.wandb_run", str(settings_file)],
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=log_file,
                    env={**os.environ, "PYTHONPATH": python_path},
                    start_new_session=True,  # signals for the trainer's process group are not for this one
                )
            assert self._process.stdin is not None
            self._pipe = self._process.stdin.fileno()
            os.set_blocking(self._pipe, False)
        except OSError as error:
            self._turn_off(str(error))

    def log(self, strict_json_line: str) -> None:
        """Hand over one line of metrics; it must hold "step"."""
        if self._process is None:
            return
        if len(self._pending) > _MAX_PENDING_BYTES:
            if self._num_dropped == 0:
                _log.warning(
                    "W&B does not keep up: its lines are left out from now on (metrics.jsonl has them)"
                )
            self._num_dropped += 1
            self._send()
            return
        self._pending += strict_json_line.encode() + b"\n"
        self._send()

    def close(self, timeout_s: float = 30.0) -> None:
        """Let W&B finish (upload, when online); past `timeout_s` it is ended and the run is synced by
        hand."""
        if self._process is None:
            return
        deadline = time.monotonic() + timeout_s
        self._pending += b"finish\n"
        while self._pending and self._process is not None and time.monotonic() < deadline:
            self._send()
            select.select([], [self._pipe], [], 0.1)
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            exit_code = process.wait(max(0.1, deadline - time.monotonic()))
            if exit_code != 0:
                _log.warning("W&B ended with an error: %s", self._last_words())
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _log.warning("W&B did not finish within %.0f s; `wandb sync` uploads what it kept", timeout_s)
        finally:
            _close_pipe(process)

    def _send(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._pipe, self._pending[:65536]) :]
        except BlockingIOError:
            pass  # the pipe is full; the rest goes with the next line
        except OSError as error:
            self._turn_off(self._last_words() or str(error))

    def _turn_off(self, reason: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            _close_pipe(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _log.warning("W&B is off from now on, training goes on: %s", reason)

    def _last_words(self) -> str:
        try:
            lines = self._log_file.read_text(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _run_id(file: Path) -> str:
    if file.exists() and (run_id := file.read_text().strip()):
        return run_id
    run_id = secrets.token_hex(4)
    file.write_text(run_id + "\n")
    return run_id


def _close_pipe(process: subprocess.Popen) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


# --- the other end of the pipe


def choose_mode(mode: str, environment: Mapping[str, str]) -> tuple[Any, str]:
    """("online" | "offline" | "disabled", reason) for the configured mode.

    "auto" follows WANDB_MODE where it is set; otherwise it is online with a key and a reachable server, else
    offline.
    """
    if mode != "auto":
        return mode, "as configured"
    if environment.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environment["WANDB_MODE"], "as WANDB_MODE says"
    base_url = environment.get("WANDB_BASE_URL", _DEFAULT_BASE_URL)
    if not environment.get("WANDB_API_KEY") and not _has_netrc_entry(
        urlsplit(base_url).hostname or "", environment
    ):
        return "offline", "there is no API key (WANDB_API_KEY or `wandb login`)"
    try:
        urllib.request.urlopen(base_url, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says: the server is there
    except (OSError, ValueError) as error:
        return "offline", f"{base_url} cannot be reached ({error})"
    return "online", "there is a key and a network"


def _has_netrc_entry(host: str, environment: Mapping[str, str]) -> bool:
    file = Path(environment.get("NETRC") or Path(environment.get("HOME", "~")).expanduser() / ".netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _main(settings_file: Path) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)  # the end of the pipe is the only sign to stop
    import wandb

    settings = json.loads(settings_file.read_text())
    mode, reason = choose_mode(settings.pop("mode"), os.environ)
    print(f"W&B {mode}: {reason}", flush=True)
    quiet = wandb.Settings(console="off", init_timeout=60)
    try:
        run = wandb.init(mode=mode, resume="allow", settings=quiet, **settings)
    except Exception as error:  # whatever it is, the lines must not be lost: they can be synced later
        if mode != "online":
            raise
        print(f"W&B offline, as online failed: {error}", flush=True)
        run = wandb.init(mode="offline", resume="allow", settings=quiet, **settings)
    for line in sys.stdin:
        if line == "finish\n":
            break
        if not line.endswith("\n"):
            continue  # the trainer was killed in the middle of it
        metrics = decode_line(line)
        run.log(metrics, step=metrics["step"])
    run.finish()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
