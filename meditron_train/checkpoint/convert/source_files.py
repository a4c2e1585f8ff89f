"""The files that a conversion reads: what identifies them, and whether they have stayed the same."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.megatron.source import (
    MegatronOptions,
    MegatronSource,
    find_iteration,
    tokenizer_beside,
)
from meditron_train.errors import UserError
from meditron_train.tokenizer.files import tokenizer_files

_MAX_LISTED = 5
_MAX_DEPTH = 4
# Where the formats that are read keep files below a model's directory.
_SUBDIRECTORIES = re.compile(
    r"hf|additional_chat_templates|tokenizer|context|nemo_tokenizer|weights|release|iter_\d+|mp_rank_\d+(_\d+)?"
)

_State = tuple[int, int, int, int]  # size, time of change, device, inode


class SourceFiles:
    """The inputs of a conversion as they are before the first of them is opened.

    Args:
        directories: all files of a model.
        hf_files: directories of which only configuration, tokenizer and generation settings are read.
    """

    def __init__(self, *directories: Path | None, hf_files: Sequence[Path | None] = ()) -> None:
        looks = [(d, _states) for d in directories if d] + [(d, _hf_states) for d in hf_files if d]
        self._before = [(directory, look, look(directory)) for directory, look in looks]

    def require_unchanged(self) -> None:
        """Check that no file was written, replaced, added or removed since: what was read could be a mixture
        of two models.

        Raises:
            UserError: some were; the message names them.
        """
        for directory, look, before in self._before:
            now = look(directory)
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if changed:
                more = f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
                raise UserError(
                    f"{directory} was changed while it was read ({', '.join(changed[:_MAX_LISTED])}{more}): the result "
                    "could mix two models, so nothing was written. Convert again when nothing writes there"
                )


def files_identity(directory: Path) -> list[list[Any]]:
    """Name, size and time of change of every file of a model's directory: another list is another source."""
    return sorted([name, size, time] for name, (size, time, _, _) in _states(directory).items())


def open_megatron(checkpoint: Path, options: MegatronOptions) -> tuple[SourceFiles, MegatronSource]:
    """Another program's checkpoint, and its inputs: of a run, which may go on, one iteration and the tokenizer.

    Raises:
        UserError: as `MegatronSource`.
    """
    while True:
        iteration = find_iteration(checkpoint)
        tokenizer = options.tokenizer or tokenizer_beside(checkpoint, iteration)
        inputs = SourceFiles(iteration, hf_files=(tokenizer, options.config))
        source = MegatronSource(checkpoint, options)
        if source.directory == iteration:  # else the run has saved a newer one meanwhile
            return inputs, source


def _states(directory: Path) -> dict[str, _State]:
    """Name -> state of every file in a directory and in those below it in which a format keeps files. What else lies
    there, or where links lead, is no input."""
    found: dict[str, _State] = {}
    waiting, seen = [(directory, 0)], set()
    while waiting:
        parent, depth = waiting.pop()
        with suppress(OSError), os.scandir(parent) as entries:
            status = os.stat(parent)
            if (place := (status.st_dev, status.st_ino)) in seen:  # a link to a directory above
                continue
            seen.add(place)
            for entry in entries:
                if entry.is_dir():
                    if depth < _MAX_DEPTH and _SUBDIRECTORIES.fullmatch(entry.name):
                        waiting.append((Path(entry.path), depth + 1))
                else:
                    _add_state(found, Path(entry.path), directory)
    return found


def _hf_states(directory: Path) -> dict[str, _State]:
    """Of a directory from which only configuration, tokenizer and generation settings are taken."""
    found: dict[str, _State] = {}
    names = ("config.json", "generation_config.json")
    for path in (*tokenizer_files(directory).values(), *(directory / name for name in names)):
        _add_state(found, path, directory)
    return found


def _add_state(found: dict[str, _State], path: Path, directory: Path) -> None:
    with suppress(OSError):  # a link that leads nowhere is no file
        status = path.stat()
        key = path.relative_to(directory).as_posix()
        found[key] = (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)
