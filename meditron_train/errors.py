"""The kinds of failure that end a command with one clear message instead of a traceback."""

from __future__ import annotations

import errno

# Of an OSError: a path that cannot be what it was given for is the user's to correct; a full or failing disk is not.
WRONG_PATH = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
    | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
)


class MeditronError(Exception):
    """The program or the machine failed (a full disk, a dead node): exit code 1."""

    exit_code = 1


class UserError(MeditronError):
    """The user's input or configuration is wrong: exit code 2.

    The message says what is wrong, where, with the values found, and what to write instead.
    """

    exit_code = 2


class RequeueError(MeditronError):
    """The run cannot go on in these processes, but started again it can: exit code 85."""

    exit_code = 85


class SaveError(MeditronError):
    """A checkpoint could not be written; the earlier ones are untouched."""
