"""The directory of a run: its structure, the lock that keeps two runs out of it, and what may change on
resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.sharded.store import FINISHED_NAME
from meditron_train.config.load import dump_config
from meditron_train.config.schema import Config
from meditron_train.config.yaml_file import read_yaml
from meditron_train.errors import Cause, MeditronError, UserError
from meditron_train.files import is_disk_fault
from meditron_train.log import get_logger
from meditron_train.train.life.run_lock import RunLock

_log = get_logger(__name__)

# A checkpoint continues only under the model, the samples and their order that it was made with. The rest may
# change: the layout, the length of the run, what is logged, saved and validated, the optimizer's settings.
_FIXED_KEYS = (
    *("model", "data", "train.seq_len", "train.global_batch_size", "train.batch_ramp"),
    *("train.seed", "train.precision", "train.freeze", "parallel.distributed_optimizer"),
)
# Of data.phases those that had begun are checked when the checkpoint is read.
_FREE_KEYS = (
    *("model.allow_nonfinite", "model.license", "data.prefetch", "data.cache_dir"),
    *("data.validation", "data.phases"),
)


class RunDir:
    """RUN_DIR of one run. Every rank may hold one for its paths; one rank creates, locks and writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.config_file = self.path / "config.yaml"
        self._lock = RunLock(self.path)

    def create(self) -> None:
        """Make the directories that are missing.

        Raises:
            UserError: the system does not allow it.
        """
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
        """Take the directory for this process, creating it if needed.

        Raises:
            UserError: another run has it; the message names the owner.
        """
        self.create()
        self._lock.acquire()

    def unlock(self) -> None:
        """Give the directory back; without a lock, nothing happens."""
        self._lock.release()

    def check_resumable(self, config: Config) -> None:
        """Refuse to resume this directory's run with another model or other data.

        Other differences are logged. Nothing is checked without a checkpoint or without a config.yaml.

        Raises:
            UserError: lists every differing key with both values.
        """
        if not self.has_checkpoints() or not self.config_file.exists():
            return
        old = self._read_config()
        new = config.model_dump(mode="json", by_alias=True)
        fixed: list[str] = []
        free: list[str] = []
        for key, old_value, new_value in _differences(old, new):
            is_fixed = _is_fixed(key)
            if key == "model.from" and config.model.from_ is not None and self._holds(config.model.from_):
                is_fixed = False  # the base is gone, and one of the run's own checkpoints named in its place
            (fixed if is_fixed else free).append(f"{key}: {old_value!r} -> {new_value!r}")
        if fixed:
            raise UserError(
                f"{self.path} holds checkpoints of a run with another configuration (then -> now):\n"
                + "".join(f"  - {line}\n" for line in fixed)
                + "Give a new logging.run_dir to start another run, or put these values back to resume this "
                f"one. (If only the place of the same files has changed, correct it in {self.config_file}.)",
                cause=Cause.CHANGED,
            )
        if free:
            _log.info("resuming with changed settings (then -> now): %s", "; ".join(free))

    def _holds(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration as config.yaml, atomically.

        Raises:
            MeditronError: the file cannot be written.
        """
        try:
            dump_config(config, self.config_file)
        except OSError as error:
            cause = Cause.DISK if is_disk_fault(error) else None
            raise MeditronError(f"{self.config_file} cannot be written: {error}", cause=cause) from error

    def _read_config(self) -> dict[str, Any]:
        try:
            return read_yaml(self.config_file, unescape=True)
        except UserError as error:
            raise UserError(
                f"{self.config_file}, which says what the checkpoints beside it were trained with, cannot be "
                f"read: {error}. Restore it (each checkpoint's meta.json has a copy) or give a new "
                "logging.run_dir"
            ) from None


def _creation_error(path: Path, error: OSError) -> MeditronError:
    if is_disk_fault(error):
        return MeditronError(f"the run directory {path} cannot be created: {error}", cause=Cause.DISK)
    return UserError(f"the run directory {path} cannot be created: {error}; choose another logging.run_dir")


def fixed_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs of the settings that a checkpoint fixes: "key: old -> new".

    Args:
        old, new: configurations as `model_dump(mode="json", by_alias=True)` gives them.
    """
    return [f"{key}: {one!r} -> {other!r}" for key, one, other in _differences(old, new) if _is_fixed(key)]


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


def _is_fixed(key: str) -> bool:
    return _is_under(key, _FIXED_KEYS) and not _is_under(key, _FREE_KEYS)


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)
