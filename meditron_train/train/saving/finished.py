"""Is a run done, and where are its exports? Its ranks ask when they start, the pre-flight of a job before they do.

Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from meditron_train.checkpoint.manifest import MANIFEST_NAME, read_manifest
from meditron_train.checkpoint.sharded.store import step_of
from meditron_train.config.schema import Config
from meditron_train.files import sha256_file
from meditron_train.report.status import read_status


def is_done(run_dir: Path, config: Config, newest: Path | None) -> bool:
    """Whether all steps are done, and exported where that is asked for.

    Args:
        run_dir: of the run.
        config: its configuration, with `knows_steps`.
        newest: its newest checkpoint. Its hashes are not looked at.
    """
    if newest is None or step_of(newest) != config.train.steps:
        return False
    # The last checkpoint is published before the export: a run that failed in between is not done.
    if (read_status(run_dir) or {}).get("state") != "done":
        return False
    return not config.checkpoint.export_hf or find_export(newest, run_dir / config.export_name) is not None


def find_export(checkpoint: Path, directory: Path) -> Path | None:
    """Where `export_run` has left the export of this checkpoint; None where it has not."""
    for place in export_places(directory, checkpoint):
        if not os.path.lexists(place):
            return None
        if is_export_of(checkpoint, place):
            return place
    raise AssertionError("there is always another name")


def export_places(directory: Path, checkpoint: Path) -> Iterator[Path]:
    """The directory, then others beside it: hf, hf_step_00000100, hf_step_00000100_2, ..."""
    yield directory
    other = directory.with_name(f"{directory.name.partition('_step_')[0]}_{checkpoint.name}")
    if other != directory:
        yield other
    yield from (other.with_name(f"{other.name}_{number}") for number in count(2))


def is_export_of(checkpoint: Path, directory: Path) -> bool:
    """Whether the directory holds an export of this checkpoint; files that others have added do not matter."""
    said = (read_manifest(directory) or {}).get("source")
    return isinstance(said, dict) and said.get("manifest_sha256") == sha256_file(checkpoint / MANIFEST_NAME)
