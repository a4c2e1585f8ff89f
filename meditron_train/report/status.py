"""How a run is doing, for people and batch scripts: RUN_DIR/status.json, RUN_DIR/requeue, and what failed.

    status.json                     state, cause, step, last checkpoint, hosts, every start with the reason for it
    requeue                         there when the run ended and wants to be started again; JSON: cause and reason
    logs/rank_00003.failure.json    the exception that ended a rank, with its cause

An exit code does not survive torchrun, so a batch script goes by the files: `requeue` there: start again, unless its
cause is a person's wish (docs/explanation/reliability.md). Not there: `status.json` says "done", "failed" (the run gave
up, and says why), "crashed" (it met a bug, or lost other ranks) or still "running" (it was killed from outside, or its
machine was lost). All three are replaced atomically; where they cannot be written, training goes on.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from meditron_train.errors import Cause, ExitCode, MeditronError, RequeueError, cause_of
from meditron_train.files import is_disk_full, read_json_object, read_whole, replace_text
from meditron_train.log import get_logger

_log = get_logger(__name__)
_MAX_REQUEUE_BYTES = 1 << 20

STATUS_NAME = "status.json"
REQUEUE_NAME = "requeue"
LOG_DIR_KEY = "log_dir"
STATUS_FORMAT = "meditron-train-status/1"

State = Literal["starting", "running", "stopped", "failed", "crashed", "done"]
_SECONDS_BETWEEN_STEPS = 1.0  # steps of milliseconds need not each cost a rename on a shared file system
_MAX_STARTS = 200
_MAX_COUNT = 1 << 32  # of a step, a process or a rank
MAX_RANKS = 1 << 20


class RunStatus:
    """Keeps status.json of a run while its `with` block runs. With `enabled=False` (all ranks but one): nothing.

    An exception that leaves the block decides the state. RequeueError: "stopped", with a request to requeue.
    Another MeditronError, or a full or failing disk: "failed". Anything else, such as the loss of another
    rank: "crashed".
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
        record = {
            "time": _now(),
            "why": _reason_for_start(before, self._run_dir),
            "last_sign_before": before.get("updated"),
            "last_step_before": before.get("step"),
            **facts,
        }
        (self._run_dir / REQUEUE_NAME).unlink(missing_ok=True)
        self._values = {
            "format": STATUS_FORMAT,
            "run_id": before.get("run_id") or secrets.token_hex(8),
            "state": "starting",
            "step": None,
            "last_checkpoint": before.get("last_checkpoint"),
            "cause": None,
            "reason": None,
            "exit_code": None,
            "saving_s": before.get("saving_s", 0.0),
            "validation_s": before.get("validation_s", 0.0),
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

    def add(self, **seconds: float) -> None:
        """Add to values that count over all starts: saving_s and validation_s, in which training stood still."""
        self.update(**{name: self._values.get(name, 0.0) + more for name, more in seconds.items()})

    def stopped(self, reason: str, cause: Cause) -> None:
        """The run ends on purpose, before its last step: ask for it to be started again."""
        if self._enabled:
            request_requeue(self._run_dir, reason, cause)
            self.update(state="stopped", cause=cause, reason=reason, exit_code=ExitCode.REQUEUE)

    def __enter__(self) -> RunStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled or not self._values or error is None:
            return
        if isinstance(error, RequeueError):
            self.stopped(str(error), error.cause)
        elif isinstance(error, MeditronError):
            self.update(state="failed", cause=error.cause, reason=str(error), exit_code=error.exit_code)
        elif cause_of(error) is Cause.DISK:
            self.update(state="failed", cause=Cause.DISK, reason=str(error), exit_code=ExitCode.FAILED)
        else:
            reason = f"{type(error).__name__}: {error}"
            self.update(state="crashed", cause=cause_of(error), reason=reason, exit_code=ExitCode.FAILED)

    def _write(self) -> None:
        self._values["updated"] = _now()
        self._last_write_s = time.monotonic()
        text = json.dumps(self._values, indent=1, default=str) + "\n"
        try:
            try:
                replace_text(self._path, text, durable=False, shared=True)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                _overwrite(self._path, text)
            self._has_failed_to_write = False
        except OSError as error:
            if not self._has_failed_to_write:
                _log.warning("%s could not be written, training goes on: %s", self._path, error)
            self._has_failed_to_write = True


def _overwrite(path: Path, text: str) -> None:
    """Write over the blocks that the file has, the last resort on a full disk; a kill in the middle may tear it."""
    with open(path, "r+b") as file:
        file.write(text.encode())
        file.truncate()


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of RUN_DIR/status.json; None where there is none that can be read.

    Whoever may write the directory may have written the file: a value of another kind than ours counts as absent.
    """
    try:
        status = read_json_object(Path(run_dir) / STATUS_NAME)
    except MeditronError:
        return None
    sound = {key: value for key, value in status.items() if _KINDS.get(key, lambda _: True)(value)}
    return {"starts": [], **sound}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(fits(item) for item in value)


def _is_start(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key)) for key in ("time", "why"))


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("state", "run_id", "updated"), _is_text),
    **dict.fromkeys(("last_checkpoint", "cause", "reason", LOG_DIR_KEY), _optional(_is_text)),
    **dict.fromkeys(("step", "steps", "exit_code", "pid", "world_size"), _optional(_is_count)),
    "hosts": _all(_is_text),
    "starts": _all(_is_start),
}


@dataclass(frozen=True)
class Requeue:
    """The request of a run to be started again."""

    cause: Cause
    reason: str


def request_requeue(run_dir: Path, reason: str, cause: Cause) -> None:
    """Write RUN_DIR/requeue durably; any rank may. Where it cannot be written: a warning."""
    try:
        replace_text(
            Path(run_dir) / REQUEUE_NAME,
            json.dumps({"cause": cause, "reason": reason}) + "\n",
            durable=True,
            shared=True,
        )
    except OSError as error:
        _log.warning("%s could not be written: %s", Path(run_dir) / REQUEUE_NAME, error)


def read_requeue(run_dir: Path) -> Requeue | None:
    """Why the run asks to be started again; None when it does not."""
    try:
        text = read_whole(Path(run_dir) / REQUEUE_NAME, _MAX_REQUEUE_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return None
    try:
        values = json.loads(text)
        return Requeue(Cause(values["cause"]), str(values["reason"]))
    except (ValueError, KeyError, TypeError, RecursionError):  # another version's, or a person's
        return Requeue(Cause.FAILED, text.strip())


def record_failure(run_dir: Path, rank: int, error: BaseException, step: int | None) -> None:
    """Leave the exception that ends `rank` for `doctor --run`. A failure to write it is ignored."""
    record = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "step": step,
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, MeditronError) else ExitCode.FAILED,
        "cause": cause_of(error),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        replace_text(
            failure_path(run_dir, rank), json.dumps(record, indent=1) + "\n", durable=False, shared=True
        )
    except OSError as problem:
        _log.warning("the failure of rank %d could not be recorded: %s", rank, problem)


def read_failures(run_dir: Path) -> list[dict[str, Any]]:
    """What `record_failure` left, the earliest first."""
    records = []
    for path in sorted((Path(run_dir) / "logs").glob("rank_*.failure.json")):
        try:
            record = read_json_object(path)
            texts = (record["kind"], record["host"], record["message"])
            if _is_count(record["rank"]) and record["rank"] < MAX_RANKS and all(map(_is_text, texts)):
                records.append((float(record["time"]), record))
        except (MeditronError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return [record for _, record in sorted(records, key=lambda pair: (math.isnan(pair[0]), pair[0]))]


def forget_failures(run_dir: Path) -> None:
    """Remove the failures of an earlier start."""
    for path in (Path(run_dir) / "logs").glob("rank_*.failure.json"):
        path.unlink(missing_ok=True)


def failure_path(run_dir: Path, rank: int) -> Path:
    """Where `record_failure` leaves the failure of `rank`."""
    return Path(run_dir) / "logs" / f"rank_{rank:05d}.failure.json"


def _reason_for_start(before: Mapping[str, Any], run_dir: Path) -> str:
    """Why a run is started (again), from what the start before left."""
    state = before.get("state")
    if state is None:
        return "first start"
    if requeue := read_requeue(run_dir):
        return requeue.reason
    if state == "done":
        return "continued after its end"
    if state in ("stopped", "failed", "crashed"):
        return f"{state}: {before.get('reason')}"
    return (
        f"ended without a word after step {before.get('step')} (killed from outside, or its machine was lost)"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
