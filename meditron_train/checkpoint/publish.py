"""Write a directory under another name and publish it by one rename: what bears the final name is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meditron_train.checkpoint.manifest import MANIFEST_NAME, sync_directory, write_manifest
from meditron_train.errors import MeditronError, UserError

_MARKER = ".being-written-by-meditron-train"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def publish(directory: str | Path, num_bytes: int = 0, with_manifest: bool = False) -> Iterator[Path]:
    """Yield `DIRECTORY.tmp` to write into; rename it to `DIRECTORY` if the block ends well, else remove it.

    `num_bytes`: what will be written, checked against the free space first. `with_manifest`: hash what was written
    into manifest.json. A `.tmp` left by a killed earlier attempt is removed. Raises UserError when the directory
    exists and is not empty (or `.tmp` is somebody else's), MeditronError when the disk is full.
    """
    directory = Path(os.path.abspath(directory))
    require_absent(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    if temporary.exists() and not any((temporary / name).is_file() for name in (_MARKER, MANIFEST_NAME)):
        raise UserError(f"{temporary} is in the way and was not written by this program. Move it away.")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / _MARKER).touch()
        _check_free_space(directory.parent, num_bytes)
        yield temporary
        if with_manifest:
            (temporary / MANIFEST_NAME).touch()  # marks the directory as ours from here on
        (temporary / _MARKER).unlink()
        if with_manifest:
            write_manifest(temporary)
        sync_directory(temporary)
        temporary.rename(directory)  # an empty directory of that name is replaced
        sync_directory(directory.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in _DISK_FULL:
            raise MeditronError(f"No space left on the disk of {directory}: nothing was written.") from error
        raise MeditronError(f"Writing {directory} failed: {error}. Nothing was written.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_absent(directory: str | Path) -> None:
    """Raise UserError unless `directory` does not exist or is an empty directory."""
    directory = Path(directory)
    if directory.is_dir():
        if any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not empty. Name a new directory, or remove this one.")
    elif os.path.lexists(directory):
        raise UserError(f"{directory} exists and is not a directory. Name a new directory.")


def _check_free_space(parent: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise MeditronError(
            f"{parent} has {free / 1e9:.2f} GB free, but {num_bytes / 1e9:.2f} GB would be written. "
            "Free some space or write elsewhere."
        )
