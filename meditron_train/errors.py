"""The kinds of failure that end a command with one clear message instead of a traceback."""

from __future__ import annotations

import enum
import errno


class ExitCode(enum.IntEnum):
    """What the process's exit code says to scripts."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    REQUEUE = 85
    """Stopped early on purpose, or by a fault that a restart fixes: the same command continues the run."""
    INTERRUPTED = 130


class Cause(enum.StrEnum):
    """Why a run ends before its last step, as data: batch scripts and `doctor` go by it, never by a message's words."""

    # requests
    TIME_LIMIT = "time_limit"
    """The batch system's warning before the time limit (SIGUSR1)."""
    TERMINATED = "terminated"
    """The batch system, or a person, ends the processes (SIGTERM): preemption, scancel."""
    STOP_FILE = "stop_file"
    """A person made RUN_DIR/stop."""
    INTERRUPTED = "interrupted"
    """Ctrl-C."""
    # faults that a restart may fix
    HANG = "hang"
    REPLICAS_DIFFER = "bit_flip"
    """Copies of the same weights differ."""
    DIRECTORY_IN_USE = "in_use"
    """Another process has the run directory, maybe one that is left of an earlier start."""
    # what a person has to look at
    DISK = "disk"
    """Full, read-only or failing."""
    OUT_OF_MEMORY = "out_of_memory"
    BAD_STEPS = "nan"
    """Too many steps were not finite or anomalous."""
    CHANGED = "data_changed"
    """The data, the model or the configuration is not what the run's checkpoints were made with."""
    USER_ERROR = "user_error"
    FAILED = "failed"
    """Any other failure that the program has a message for."""
    CRASHED = "crashed"
    """An unexpected exception, or the loss of another rank."""


# What the errno of an OSError means. A path that cannot be what it was given for is the user's to correct: exit code 2.
# A disk that is full, failing, or read-only (as Linux makes a failing one) is not: exit code 1, Cause.DISK.
WRONG_PATH = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
    | {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
)
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK_FAULT = DISK_FULL | {errno.EIO, errno.EROFS}


class MeditronError(Exception):
    """The program or the machine failed (a full disk, a dead node): exit code 1.

    Attributes:
        cause: what programs may go by, as the message is for people.
    """

    exit_code = ExitCode.FAILED
    cause = Cause.FAILED

    def __init__(self, message: object = "", *, cause: Cause | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.cause = cause


class UserError(MeditronError):
    """The user's input or configuration is wrong: exit code 2.

    The message says what is wrong, where, with the values found, and what to write instead.
    """

    exit_code = ExitCode.USER_ERROR
    cause = Cause.USER_ERROR


class PassingError(MeditronError):
    """What another attempt may not meet, as it says nothing of the data: a disk that cannot be read at the moment, a
    process that has gone. What was done so far is kept for that attempt."""


class RequeueError(MeditronError):
    """The run cannot go on in these processes, but started again it can: exit code 85."""

    exit_code = ExitCode.REQUEUE


class SaveError(MeditronError):
    """A checkpoint could not be written; the earlier ones are untouched."""


def cause_of(error: BaseException) -> Cause:
    """The cause of any exception that ends a run."""
    if isinstance(error, MeditronError):
        return error.cause
    if isinstance(error, OSError) and error.errno in DISK_FAULT:
        return Cause.DISK
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, unknown on this floor
        return Cause.OUT_OF_MEMORY
    return Cause.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Cause.CRASHED
