"""The directory of a run: its structure, and the lock that keeps two runs out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.sharded.store import FINISHED_NAME
from meditron_train.config.load import dump_config
from meditron_train.config.schema import Config
from meditron_train.config.yaml_file import read_yaml
from meditron_train.errors import Cause, MeditronError, UserError
from meditron_train.files import is_disk_fault
from meditron_train.train.life.run_lock import RunLock


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

    def holds(self, checkpoint: Path) -> bool:
        """Whether it is one of the run's own checkpoints."""
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

    def read_config(self) -> dict[str, Any]:
        """The configuration that the run was last started with, as it stands in config.yaml.

        Raises:
            UserError: it cannot be read.
        """
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
