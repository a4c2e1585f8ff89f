"""The lock that keeps two runs out of one directory: RUN_DIR/.lock.

The kernel holds it (flock) and lets go when the process ends in any way; the file's text says who the owner is. Not
every file system has locks that other hosts see, so the owner also touches the file every few seconds: a name left by
another host is watched for a while, and is taken as gone if the file does not change. No host's clock matters.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from meditron_train.errors import Cause, MeditronError, UserError
from meditron_train.files import has_no_locks, is_disk_fault
from meditron_train.log import get_logger

_log = get_logger(__name__)

_MAX_OWNER_CHARS = 1 << 20  # its command may be long
TOUCH_INTERVAL_S = 5.0
WATCH_S = 4 * TOUCH_INTERVAL_S
# A requeued job may start while the last processes of the previous job are still exiting.
WAIT_FOR_OWN_JOB_S = 120.0


class RunLock:
    """Held by one process, from acquire() to release(); the object must live as long."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        self._file: IO[str] | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock. One that a killed process left is taken over, with a line in the log.

        Raises:
            UserError: another run has it; the message names the owner.
        """
        try:
            file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # noqa: SIM115
        except OSError as error:
            kind = MeditronError if is_disk_fault(error) else UserError
            raise kind(
                f"the lock {self._path} cannot be made: {error}; choose another logging.run_dir",
                cause=Cause.DISK if is_disk_fault(error) else None,
            ) from error
        try:
            has_flock = self._wait_for_own_job(file)
            owner = _read_owner(file)
            if has_flock is False or (owner and not self._is_gone(owner, has_flock)):
                raise self._in_use(owner, certain=has_flock is False)
            if owner:
                _log.warning(
                    "%s was left locked by %s, which is gone; the lock is taken over",
                    self._run_dir,
                    _name(owner),
                )
            _write_owner(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        self._released.clear()
        threading.Thread(target=self._keep_touching, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give it back; without a lock, nothing happens."""
        if self._file is None:
            return
        self._released.set()
        with contextlib.suppress(OSError):  # the text only informs; closing is what unlocks
            self._file.truncate(0)
        self._file.close()
        self._file = None

    def _wait_for_own_job(self, file: IO[str]) -> bool | None:
        """As `_try_flock`, but patient with an earlier start of this same job, and with what a killed process left:
        forks that were writing a checkpoint share its lock until they end."""
        deadline = time.monotonic() + WAIT_FOR_OWN_JOB_S
        while (has_flock := _try_flock(file)) is False and time.monotonic() < deadline:
            owner = _read_owner(file)
            is_own_job = owner.get("job") is not None and owner["job"] == os.environ.get("SLURM_JOB_ID")
            if not is_own_job and not _is_dead_here(owner):
                break
            _log.info("%s is still held by what is left of %s: waiting", self._run_dir, _name(owner))
            time.sleep(TOUCH_INTERVAL_S)
        return has_flock

    def _is_gone(self, owner: Mapping[str, Any], has_flock: bool | None) -> bool:
        """Whether the owner that left its name no longer runs. flock answers for this host, the touching for others."""
        if owner.get("host") == socket.gethostname():
            if has_flock:
                return True
            if _is_dead_here(owner):
                return True
        _log.info("%s bears the name of %s: watching for a sign of life", self._path, _name(owner))
        before, deadline = self._path.stat().st_mtime_ns, time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_S / 4))
            os.listdir(self._run_dir)  # makes NFS look again
            if self._path.stat().st_mtime_ns != before:
                return False
        return True

    def _keep_touching(self) -> None:
        while not self._released.wait(TOUCH_INTERVAL_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _in_use(self, owner: Mapping[str, Any], *, certain: bool) -> UserError:
        who = _name(owner) if owner else "a process that has not given its name yet"
        message = (
            f"{self._run_dir} is in use by {who}. Two runs must not write one directory: wait for that run, end "
            "it, or give this one its own logging.run_dir."
        )
        if not certain:
            message += f" If that process is surely gone, remove {self._path}."
        return UserError(message, cause=Cause.DIRECTORY_IN_USE)


def _try_flock(file: IO[str]) -> bool | None:
    """True: the lock is ours; False: another process has it; None: this file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if has_no_locks(error):
            _log.warning("the file system of %s has no file locks (%s)", file.name, error.strerror)
            return None
        raise
    return True


def _read_owner(file: IO[str]) -> dict[str, Any]:
    """What the owner wrote about itself; {} where that is missing or unreadable."""
    try:
        file.seek(0)
        owner = json.loads(file.read(_MAX_OWNER_CHARS))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(file: IO[str]) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) + "\n")
    file.flush()


def _is_dead_here(owner: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this host and no longer runs."""
    pid = owner.get("pid")
    return (
        owner.get("host") == socket.gethostname()
        and isinstance(pid, int)
        and not Path(f"/proc/{pid}").exists()
    )


def _name(owner: Mapping[str, Any]) -> str:
    unknown = "unknown"
    return (
        f"process {owner.get('pid', unknown)} on host {owner.get('host', unknown)} "
        f"since {owner.get('since', unknown)} ({owner.get('command', unknown)})"
    )
