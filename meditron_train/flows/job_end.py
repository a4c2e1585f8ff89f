"""What launch/train.sbatch does after the ranks have ended, by the causes that they left as data.

    python -m meditron_train.flows.job_end LOG_DIR RUN_DIR

prints one line: an action, an exit code, and words for people. An exit code of a rank does not survive torchrun, so
the ranks leave files: RUN_DIR/requeue, RUN_DIR/status.json, RUN_DIR/logs/rank_*.failure.json and LOG_DIR/user_error.
Only those of this start count: they are newer than LOG_DIR/started.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meditron_train.errors import Cause, ExitCode, UserError
from meditron_train.files import read_json_object, replace_text
from meditron_train.report.status import (
    REQUEUE_NAME,
    STATUS_NAME,
    failure_path,
    read_failures,
    read_requeue,
    read_status,
)

USER_ERROR_NAME = "user_error"
STARTED_NAME = "started"


class Action(enum.StrEnum):
    END = "end"
    """A person wanted the run to stop: the job ends well."""
    REQUEUE = "requeue"
    """The ranks were asked to stop and have saved: the job is requeued."""
    GIVE_UP = "give_up"
    """Starting again would not help."""
    RETRY = "retry"
    """Start again, counting the failure."""


@dataclass(frozen=True)
class Decision:
    """What to do; `exit_code` is the job's where it ends now. `why` is one line for people."""

    action: Action
    exit_code: int
    why: str


_REQUESTS = {
    Cause.STOP_FILE: Action.END,
    Cause.INTERRUPTED: Action.END,
    Cause.TIME_LIMIT: Action.REQUEUE,
    Cause.TERMINATED: Action.REQUEUE,
}


def decide(log_dir: Path, run_dir: Path) -> Decision:
    """What follows from the files of the start that began when LOG_DIR/started was made."""
    started_ns = _modified_ns(log_dir / STARTED_NAME)
    requeue = read_requeue(run_dir) if _modified_ns(run_dir / REQUEUE_NAME) > started_ns else None
    if requeue is not None and requeue.cause in _REQUESTS:
        action = _REQUESTS[requeue.cause]
        code = ExitCode.DONE if action is Action.END else ExitCode.FAILED
        return Decision(action, code, requeue.reason)
    # Before what the other ranks say: a hang or a lost connection is the consequence of one rank's mistake.
    mistake = _read_user_error(log_dir) or _mistake_of_a_rank(run_dir, started_ns)
    if mistake is not None:
        cause, message = mistake
        if cause is Cause.DIRECTORY_IN_USE:  # maybe by what is left of an earlier start
            return Decision(Action.RETRY, ExitCode.FAILED, message)
        return Decision(Action.GIVE_UP, ExitCode.USER_ERROR, message)
    if requeue is not None:
        return Decision(Action.RETRY, ExitCode.FAILED, requeue.reason)
    status = read_status(run_dir)
    if status and _modified_ns(run_dir / STATUS_NAME) > started_ns and status.get("state") == "failed":
        is_users = status.get("exit_code") == ExitCode.USER_ERROR
        code = ExitCode.USER_ERROR if is_users else ExitCode.FAILED
        return Decision(Action.GIVE_UP, code, str(status.get("reason")))
    return Decision(Action.RETRY, ExitCode.FAILED, "")


def leave_user_error(error: UserError) -> None:
    """Leave LOG_DIR/user_error, in a batch job alone: what the exit code 2 of a rank would say, had it survived."""
    log_dir = os.environ.get("LOG_DIR")
    if log_dir and "SLURM_JOB_ID" in os.environ:
        record = {"cause": error.cause, "message": str(error)}
        with suppress(OSError):
            replace_text(Path(log_dir) / USER_ERROR_NAME, json.dumps(record) + "\n")


def _read_user_error(log_dir: Path) -> tuple[Cause, str] | None:
    try:
        record = read_json_object(log_dir / USER_ERROR_NAME)
        return Cause(record["cause"]), str(record["message"])
    except (UserError, ValueError, KeyError, TypeError):
        return None


def _mistake_of_a_rank(run_dir: Path, started_ns: int) -> tuple[Cause, str] | None:
    """A mistake of the user's that rank 0 need not have met, from the failure files of the ranks."""
    for failure in read_failures(run_dir):
        rank = failure["rank"]
        if (
            failure.get("exit_code") == ExitCode.USER_ERROR
            and _modified_ns(failure_path(run_dir, rank)) > started_ns
        ):
            in_use = failure.get("cause") == Cause.DIRECTORY_IN_USE
            cause = Cause.DIRECTORY_IN_USE if in_use else Cause.USER_ERROR
            return cause, f"rank {rank} on host {failure['host']}: {failure['message']}"
    return None


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def main() -> None:
    decision = decide(Path(sys.argv[1]), Path(sys.argv[2]))
    print(decision.action.value, int(decision.exit_code), " ".join(decision.why.split()), flush=True)


if __name__ == "__main__":
    main()
