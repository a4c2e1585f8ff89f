"""Exports of a run: each takes its name only where that replaces nothing of anyone else's.

An unchanged export of ours is replaced by the next one. A link, or a directory in which someone has put or
changed a file, stays as it is, and the export goes beside it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from meditron_train.checkpoint.adapters import is_adapter_checkpoint
from meditron_train.checkpoint.convert.adapters import export_adapter
from meditron_train.checkpoint.convert.engine import NO_LIMITS, Limits
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.manifest import read_manifest, verify_manifest
from meditron_train.log import get_logger
from meditron_train.train.saving.finished import export_places, is_export_of

_log = get_logger(__name__)


def export_run(checkpoint: Path, directory: Path, limits: Limits = NO_LIMITS) -> Path:
    """Export a finished checkpoint as the Hugging Face directory `directory`.

    Nothing is written when an export of this checkpoint is there already.

    Args:
        checkpoint: the finished checkpoint.
        directory: where the export should lie.
        limits: as of `export_hf`.

    Returns:
        Where the export lies. Where `directory` is not ours to replace, that is beside it, under the name of
        the step, with a warning.
    """
    _finish_swap(directory)
    for place in export_places(directory, checkpoint):
        if is_export_of(checkpoint, place):
            _log.info("%s holds this export already", place)
            return place
        if _is_free(place):
            _export(checkpoint, place, limits)
        elif _is_unchanged_export(place):
            _swap_in(checkpoint, place, limits)
        else:
            continue
        if place != directory:
            _log.warning("%s is not an unchanged export of ours and stays as it is", directory)
        _log.info("exported %s", place)
        return place
    raise AssertionError("there is always another name")


def _export(checkpoint: Path, directory: Path, limits: Limits) -> None:
    if is_adapter_checkpoint(checkpoint):
        export_adapter(checkpoint, directory, limits=limits)
    else:
        export_hf(checkpoint, directory, limits=limits)


def _is_free(directory: Path) -> bool:
    if directory.is_dir():
        return not os.path.ismount(directory) and not any(directory.iterdir())
    return not os.path.lexists(directory)


def _is_unchanged_export(directory: Path) -> bool:
    if directory.is_symlink() or not directory.is_dir() or os.path.ismount(directory):
        return False
    if any(entry.is_symlink() or entry.is_dir() for entry in directory.iterdir()):
        return False  # an export is files only
    said = (read_manifest(directory) or {}).get("source")
    is_export = isinstance(said, dict) and said.get("format") == "sharded"
    return is_export and not verify_manifest(directory)


def _swap_in(checkpoint: Path, directory: Path, limits: Limits) -> None:
    """Write the new export beside the old one, then exchange the names: readers of open files keep them, and a kill at
    any moment leaves one export whole."""
    new, old = _beside(directory, "new"), _beside(directory, "replaced")
    if new.is_dir():  # complete, left by a kill before the names were exchanged
        shutil.rmtree(new)
    _export(checkpoint, new, limits)
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def _finish_swap(directory: Path) -> None:
    """After a kill within `_swap_in`: the old export gets its name back, or what is left of it goes."""
    old = _beside(directory, "replaced")
    if os.path.lexists(directory):
        if old.is_dir():
            shutil.rmtree(old)
    elif _is_unchanged_export(old):
        old.rename(directory)


def _beside(directory: Path, what: str) -> Path:
    """A name that nobody chooses: what is there is ours."""
    return directory.with_name(f".{directory.name}.{what}.tmp")
