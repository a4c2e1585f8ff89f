"""How a run is doing, for people and batch scripts: RUN_DIR/status.json, RUN_DIR/requeue, and what failed.

    status.json                     state, step, last checkpoint, hosts, every start with the reason for it
    requeue                         there when the run ended and wants to be started again; its text says why
    logs/rank_00003.failure.json    the exception that ended a rank

An exit code does not survive torchrun, so a batch script goes by the files: `requeue` there: start again. Not there:
`status.json` says "done", "failed" (the run gave up, and says why), "crashed" (it met a bug, or lost other ranks) or
still "running" (it was killed from outside, or its machine was lost). All three are replaced atomically; where they
cannot be written, training goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from meditron_train.errors import MeditronError, RequeueError
from meditron_train.log import get_logger

_log = get_logger(__name__)

STATUS_NAME = "status.json"
REQUEUE_NAME = "requeue"
STATUS_FORMAT = "meditron-train-status/1"

State = Literal["starting", "running", "stopped", "failed", "crashed", "done"]
_SECONDS_BETWEEN_STEPS = 1.0  # steps of milliseconds need not each cost a rename on a shared file system
_MAX_STARTS = 200


class RunStatus:
    """Keeps status.json of a run while its `with` block runs. With `enabled=False` (all ranks but one): nothing.

    An exception that leaves the block decides the state: RequeueError "stopped", with a request to requeue; another
    MeditronError "failed"; anything else, such as the loss of another rank, "crashed".
    """

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / STATUS_NAME
        self._enabled = enabled
        self._values: dict[str, Any] = {}
        self._last_write_s = 0.0
        self._has_failed_to_write = False

    @property
    def run_id(self) -> str:
        """A random name that the run keeps over all its starts ("" where the status is not kept)."""
        return self._values.get("run_id", "")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Enter a start of the run with `facts` (hosts, world_size, job_id ...); removes an old request to requeue."""
        if not self._enabled:
            return
        before = read_status(self._run_dir) or {}
        record = {"time": _now(), "why": _reason_for_start(before, self._run_dir), **facts}
        (self._run_dir / REQUEUE_NAME).unlink(missing_ok=True)
        self._values = {
            "format": STATUS_FORMAT,
            "run_id": before.get("run_id") or secrets.token_hex(8),
            "state": "starting",
            "step": None,
            "last_checkpoint": before.get("last_checkpoint"),
            "reason": None,
            "exit_code": None,
            **facts,
            "pid": os.getpid(),
            "starts": [*before.get("starts", []), record][-_MAX_STARTS:],
        }
        self._write()

    def update(self, **values: Any) -> None:
        """Change values; a mere new `step` is written once a second at most."""
        if not self._enabled:
            return
        self._values.update(values)
        if values.keys() != {"step"} or time.monotonic() - self._last_write_s > _SECONDS_BETWEEN_STEPS:
            self._write()

    def stopped(self, reason: str, exit_code: int) -> None:
        """The run ends on purpose, before its last step: ask for it to be started again."""
        if self._enabled:
            request_requeue(self._run_dir, reason)
            self.update(state="stopped", reason=reason, exit_code=exit_code)

    def __enter__(self) -> RunStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled or not self._values or error is None:
            return
        if isinstance(error, RequeueError):
            self.stopped(str(error), error.exit_code)
        elif isinstance(error, MeditronError):
            self.update(state="failed", reason=str(error), exit_code=error.exit_code)
        else:
            self.update(state="crashed", reason=f"{type(error).__name__}: {error}", exit_code=1)

    def _write(self) -> None:
        self._values["updated"] = _now()
        self._last_write_s = time.monotonic()
        try:
            _replace(self._path, json.dumps(self._values, indent=1, default=str) + "\n")
            self._has_failed_to_write = False
        except OSError as error:
            if not self._has_failed_to_write:
                _log.warning("%s could not be written, training goes on: %s", self._path, error)
            self._has_failed_to_write = True


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of RUN_DIR/status.json; None where there is none that can be read."""
    try:
        values = json.loads((Path(run_dir) / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def request_requeue(run_dir: Path, reason: str) -> None:
    """Write RUN_DIR/requeue with `reason` on one line, durably; any rank may. Where it cannot be written: a warning."""
    try:
        _replace(Path(run_dir) / REQUEUE_NAME, " ".join(reason.split()) + "\n", durable=True)
    except OSError as error:
        _log.warning("%s could not be written: %s", Path(run_dir) / REQUEUE_NAME, error)


def read_requeue(run_dir: Path) -> str | None:
    """Why the run asks to be started again; None when it does not."""
    try:
        return (Path(run_dir) / REQUEUE_NAME).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def record_failure(run_dir: Path, rank: int, error: BaseException, step: int | None) -> None:
    """Leave the exception that ends `rank` for `doctor --run`; never raises."""
    record = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "step": step,
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, MeditronError) else 1,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        _replace(_failure_path(run_dir, rank), json.dumps(record, indent=1) + "\n")
    except OSError as problem:
        _log.warning("the failure of rank %d could not be recorded: %s", rank, problem)


def read_failures(run_dir: Path) -> list[dict[str, Any]]:
    """What `record_failure` left, the earliest first."""
    records = []
    for path in sorted((Path(run_dir) / "logs").glob("rank_*.failure.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append((float(record["time"]), record))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [record for _, record in sorted(records, key=lambda pair: pair[0])]


def forget_failures(run_dir: Path) -> None:
    """Remove the failures of an earlier start."""
    for path in (Path(run_dir) / "logs").glob("rank_*.failure.json"):
        path.unlink(missing_ok=True)


def _failure_path(run_dir: Path, rank: int) -> Path:
    return Path(run_dir) / "logs" / f"rank_{rank:05d}.failure.json"


def _reason_for_start(before: Mapping[str, Any], run_dir: Path) -> str:
    """Why a run is started (again), from what the start before left."""
    state = before.get("state")
    if state is None:
        return "first start"
    if requeue := read_requeue(run_dir):
        return requeue
    if state == "done":
        return "continued after its end"
    if state in ("stopped", "failed", "crashed"):
        return f"{state}: {before.get('reason')}"
    return (
        f"ended without a word after step {before.get('step')} (killed from outside, or its machine was lost)"
    )


def _replace(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file atomically. The temporary name is this process's own, as several ranks may write."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
