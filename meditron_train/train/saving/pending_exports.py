"""Exports on the way (checkpoint.export_interval): those that are due, and those that an earlier start left undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meditron_train.config.schema import Config
from meditron_train.log import get_logger
from meditron_train.train.saving.run_checkpoints import RunCheckpoints

_log = get_logger(__name__)


class PendingExports:
    """Steps whose checkpoints are still to be exported, the same on all ranks; collective.

    Args:
        step: the last step of the run; an earlier start may have saved until then and not have exported.
    """

    def __init__(self, config: Config, checkpoints: RunCheckpoints, run_dir: Path, step: int) -> None:
        self._checkpoints, self._interval = checkpoints, config.checkpoint.export_interval
        self._directory: Callable[[int], Path] = lambda step: (
            run_dir / f"{config.export_name}_step_{step:08d}"
        )
        self._steps: list[int] = []
        if self._interval is not None:
            self._steps = checkpoints.without_export(range(0, step + 1, self._interval), self._directory)

    def is_due(self, step: int) -> bool:
        return self._interval is not None and step % self._interval == 0

    def add(self, step: int) -> None:
        """Export `step` at the next `export`, where that is due."""
        if self.is_due(step):
            self._steps.append(step)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def export(self) -> None:
        """Export what is due. What fails is tried again the next time, as long as its checkpoint is kept."""
        for step in self._steps.copy():
            directory = self._directory(step)
            try:
                if self._checkpoints.has(step):
                    self._checkpoints.export(step, directory)
                else:
                    _log.warning("%s is not written: the checkpoint of step %d is gone", directory, step)
            except Exception as error:  # a by-product, whatever stands in its way
                _log.error("%s could not be exported, training goes on: %s", directory, error)
                continue
            self._steps.remove(step)
