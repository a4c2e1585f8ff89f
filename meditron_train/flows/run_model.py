"""Which model the directory of a run stands for."""

from __future__ import annotations

from pathlib import Path

from meditron_train.checkpoint.adapters import is_adapter_directory
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY
from meditron_train.checkpoint.hf.read import is_hf_directory
from meditron_train.checkpoint.sharded.store import newest_checkpoint
from meditron_train.train.saving.finished import find_export


def model_of_run(directory: Path) -> Path:
    """Of a run: its newest whole checkpoint, as the export of that checkpoint where there is one; its export where it
    has no checkpoints any more. Any other directory is returned as it is."""
    checkpoints, exported = directory / "checkpoints", directory / HF_SUBDIRECTORY
    if is_hf_directory(directory) or not checkpoints.is_dir():
        return directory
    newest = newest_checkpoint(checkpoints)
    if newest is None:
        adapters = directory / "adapter"
        if is_adapter_directory(adapters):
            return adapters
        return exported if is_hf_directory(exported) else directory
    return find_export(newest, exported) or newest
