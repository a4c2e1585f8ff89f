"""The directory of a run: its structure, the lock that keeps two runs out of it, and what may change on
resume."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import yaml

from meditron_train.checkpoint.store import FINISHED_NAME
from meditron_train.config.load import dump_config
from meditron_train.config.schema import Config
from meditron_train.errors import MeditronError, UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

# A checkpoint continues only under the model, the samples and their order that it was made with. The rest may
# change: the layout, the length of the run, what is logged, saved and validated, the optimizer's settings.
_FIXED_KEYS = (
    *("model", "data", "train.seq_len", "train.global_batch_size", "train.batch_ramp"),
    *("train.seed", "train.precision", "parallel.distributed_optimizer"),
)
_FREE_KEYS = ("data.prefetch", "data.cache_dir", "data.validation")

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunDir:
    """RUN_DIR of one run. Every rank may hold one for its paths; one rank creates, locks and writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.config_file = self.path / "config.yaml"
        self._lock_path = self.path / ".lock"
        self._lock_file: IO[str] | None = None

    def create(self) -> None:
        """Make the directories that are missing. Raises UserError where that is not allowed."""
        try:
            for directory in (self.checkpoints, self.logs):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _creation_error(self.path, error) from error

    def has_checkpoints(self) -> bool:
        """Whether a checkpoint with a finished name is there, intact or not: then a start is a resume."""
        if not self.checkpoints.is_dir():
            return False
        return any(FINISHED_NAME.fullmatch(entry.name) for entry in self.checkpoints.iterdir())

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunDir]:
        """Hold the directory for this process: lock() ... unlock()."""
        self.lock()
        try:
            yield self
        finally:
            self.unlock()

    def lock(self) -> None:
        """Take the directory for this process, creating it if needed; this object must live as long.

        The kernel holds the lock (flock on RUN_DIR/.lock) and lets go of it when the process ends in any way;
        the file's text says who the owner is. Raises UserError, naming the owner, when another process has
        it. A lock left by a killed process is taken over, with a line in the log.
        """
        self.create()
        try:
            lock_file = open(os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644), "r+")  # noqa: SIM115
        except OSError as error:
            raise _creation_error(self.path, error) from error
        try:
            has_flock = _try_flock(lock_file)
            owner = _read_owner(lock_file)
            if has_flock is False or (has_flock is None and owner and not _is_gone(owner)):
                raise self._in_use(owner, certain=has_flock is False)
            if owner:
                _log.warning(
                    "%s was left locked by %s, which is gone; the lock is taken over", self.path, _name(owner)
                )
            _write_owner(lock_file)
        except BaseException:
            lock_file.close()
            raise
        self._lock_file = lock_file

    def unlock(self) -> None:
        """Give the directory back; without a lock, nothing happens."""
        if self._lock_file is None:
            return
        with contextlib.suppress(OSError):  # the text only informs; closing is what unlocks
            self._lock_file.truncate(0)
        self._lock_file.close()
        self._lock_file = None

    def check_resumable(self, config: Config) -> None:
        """Refuse to resume this directory's run with another model or other data.

        Raises UserError that lists every differing key with both values. Other differences are logged.
        Nothing is checked without a checkpoint or without a config.yaml.
        """
        if not self.has_checkpoints() or not self.config_file.exists():
            return
        old = self._read_config()
        new = config.model_dump(mode="json", by_alias=True)
        fixed: list[str] = []
        free: list[str] = []
        for key, old_value, new_value in _differences(old, new):
            is_fixed = _is_under(key, _FIXED_KEYS) and not _is_under(key, _FREE_KEYS)
            (fixed if is_fixed else free).append(f"{key}: {old_value!r} -> {new_value!r}")
        if fixed:
            raise UserError(
                f"{self.path} holds checkpoints of a run with another configuration (then -> now):\n"
                + "".join(f"  - {line}\n" for line in fixed)
                + "Give a new logging.run_dir to start another run, or put these values back to resume this "
                f"one. (If only the place of the same files has changed, correct it in {self.config_file}.)"
            )
        if free:
            _log.info("resuming with changed settings (then -> now): %s", "; ".join(free))

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration as config.yaml, atomically."""
        temporary = self.config_file.with_name("config.yaml.tmp")
        try:
            dump_config(config, temporary)
            os.replace(temporary, self.config_file)
        except OSError as error:
            raise MeditronError(f"{self.config_file} cannot be written: {error}") from error

    def _read_config(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.config_file.read_text(encoding="utf-8").replace("$${", "${"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.config_file}, which says what the checkpoints beside it were trained with, cannot be "
                f"read: {error}. Restore it (each checkpoint's meta.json has a copy) or give a new "
                "logging.run_dir."
            ) from None
        return values if isinstance(values, dict) else {}

    def _in_use(self, owner: Mapping[str, Any], *, certain: bool) -> UserError:
        who = _name(owner) if owner else "a process that has not given its name yet"
        message = (
            f"{self.path} is in use by {who}. Two runs must not write one directory: wait for that run, end "
            "it, or give this one its own logging.run_dir."
        )
        if not certain:
            message += f" If that process is surely gone, remove {self._lock_path}."
        return UserError(message)


def _creation_error(path: Path, error: OSError) -> MeditronError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return MeditronError(f"the run directory {path} cannot be created: {error}")
    return UserError(f"the run directory {path} cannot be created: {error}; choose another logging.run_dir")


def _try_flock(file: IO[str]) -> bool | None:
    """True: the lock is ours; False: another process has it; None: this file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            _log.warning("the file system of %s has no file locks (%s)", file.name, error.strerror)
            return None
        raise
    return True


def _read_owner(file: IO[str]) -> dict[str, Any]:
    """{} when nobody has left a name, or none that can be read."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(file: IO[str]) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) + "\n")
    file.flush()


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this host that no longer lives."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner.get("pid", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _name(owner: Mapping[str, Any]) -> str:
    unknown = "unknown"
    return (
        f"process {owner.get('pid', unknown)} on host {owner.get('host', unknown)} "
        f"since {owner.get('since', unknown)} ({owner.get('command', unknown)})"
    )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf that differs. Keys that `old` lacks are left out: it
    may have been written by an earlier version."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            yield from _differences(old[name], new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (old_item, new_item) in enumerate(zip(old, new, strict=True)):
            yield from _differences(old_item, new_item, f"{key}[{index}]")
    elif old != new:
        yield key, old, new


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)
