"""The files that a conversion reads: what identifies them, and whether they have stayed the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError

_MAX_LISTED = 5


class SourceFiles:
    """The inputs of a conversion as they are before the first of them is opened."""

    def __init__(self, *directories: Path | None) -> None:
        self._before = {directory: _states(directory) for directory in directories if directory is not None}

    def require_unchanged(self) -> None:
        """Check that no file was written, replaced, added or removed since: what was read could be a mixture
        of two models.

        Raises:
            UserError: some were; the message names them.
        """
        for directory, before in self._before.items():
            now = _states(directory)
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if changed:
                more = f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
                raise UserError(
                    f"{directory} was changed while it was read ({', '.join(changed[:_MAX_LISTED])}{more}): the result "
                    "could mix two models, so nothing was written. Convert again when nothing writes there"
                )


def files_identity(directory: Path) -> list[list[Any]]:
    """Name, size and time of change of every file below a directory: another list is another source."""
    return sorted([name, size, time] for name, (size, time, _, _) in _states(directory).items())


def _states(directory: Path) -> dict[str, tuple[int, int, int, int]]:
    """Name -> (size, time of change, device, inode) of every file below a directory."""
    found: dict[str, tuple[int, int, int, int]] = {}
    seen = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        status = os.stat(parent)
        if (place := (status.st_dev, status.st_ino)) in seen:  # a link to a directory above: it has no end
            directories.clear()
            continue
        seen.add(place)
        for name in names:
            path = Path(parent) / name
            if path.exists():
                status = path.stat()
                key = path.relative_to(directory).as_posix()
                found[key] = (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)
    return found
