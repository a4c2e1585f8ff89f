"""The directory of a run's checkpoints: what is finished, what is being written, what is kept.

    checkpoints/
      step_00000100/       finished: has a manifest, never changes again
      step_00000200.tmp/   being written (or left by a kill): never read, removed on the next start
      latest               the name of the checkpoint finished last; for people and scripts, never trusted here

A name without `.tmp` appears only by one rename of a complete, hashed and fsynced directory, and a deletion
first renames to `.tmp`; so a kill at any moment leaves nothing that looks finished and is not. One process
(rank 0) calls this class, while it holds the lock of the run directory; barriers with other ranks are the
caller's.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from meditron_train.checkpoint.manifest import (
    MANIFEST_NAME,
    describe_file,
    sync_directory,
    verify_manifest,
    write_manifest,
    write_text_atomically,
)
from meditron_train.errors import SaveError
from meditron_train.log import get_logger

__all__ = ["MANIFEST_NAME", "CheckpointStore", "verify_manifest", "write_manifest"]

_log = get_logger(__name__)

FINISHED_NAME = re.compile(r"step_(\d{8,})")
_RANKS_FILE = re.compile(r"__(\d+)_\d+\.distcp")  # as torch's writers name them
_REPLACED_SUFFIX = ".replaced.tmp"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """Publishes, finds and deletes the checkpoints of one run.

    Retention after each publication keeps the last `keep_last` steps plus every step divisible by
    `keep_every`.
    """

    def __init__(self, directory: Path, keep_last: int, keep_every: int | None) -> None:
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last and keep_every start at 1, not at {keep_last} and {keep_every}")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._broken_steps: set[int] = set()  # found by newest_intact: retention must not count on them

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The finished steps, ascending. Finished by name; whether they are intact is newest_intact's
        question."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in map(FINISHED_NAME.fullmatch, names) if match)

    def clean(self) -> list[str]:
        """Remove what a killed run left half done; returns the removed names. Call at start, before any
        begin()."""
        removed = []
        for entry in sorted(self.directory.glob("*.tmp")):
            original = entry.with_name(entry.name.removesuffix(_REPLACED_SUFFIX))
            if entry.name.endswith(_REPLACED_SUFFIX) and not original.exists():
                os.rename(entry, original)  # killed between the two renames of publish(): it is still good
            else:
                _remove(entry)
                removed.append(entry.name)
        return removed

    def check_free_space(self, needed_bytes: int) -> None:
        """Raise SaveError when the file system has less than `needed_bytes` left, before anything is
        written."""
        candidates = (self.directory, *self.directory.absolute().parents)
        existing = next(path for path in candidates if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < needed_bytes:
            raise SaveError(
                f"the next checkpoint needs about {_gib(needed_bytes)}, but {self.directory} has "
                f"{_gib(free_bytes)} free; {self._last_good()}. Free some space, or lower "
                f"checkpoint.keep_last ({self.keep_last})."
            )

    def begin(self, step: int) -> Path:
        """An empty directory `step_XXXXXXXX.tmp` to write the checkpoint of `step` into."""
        directory = self.unfinished_path(step)
        try:
            _remove(directory)
            directory.mkdir(parents=True)
        except OSError as error:
            raise self.failed(step, error) from error
        return directory

    def describe_files(self, step: int, writer: int, *, with_shared: bool) -> dict[str, dict[str, int | str]]:
        """Manifest entries of the files that rank `writer` wrote of an unfinished checkpoint, fsynced and hashed.

        `with_shared`: those of no rank in particular, too. Unlike the rest of this class, every rank may call it.
        """
        directory = self.unfinished_path(step)
        entries = {}
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            rank = _RANKS_FILE.fullmatch(path.name)
            if with_shared if rank is None else int(rank[1]) == writer:
                entries[path.relative_to(directory).as_posix()] = describe_file(path, sync=True)
        return entries

    def publish(self, step: int, entries: Mapping[str, Mapping[str, int | str]] | None = None) -> Path:
        """Hash, fsync and rename what begin(step) gave into a finished checkpoint, then apply retention.

        `entries` are of files that are hashed and on the disk already.
        Raises SaveError when the disk is full or fails; the leftovers are then removed, and the
        checkpoint published before is untouched.
        """
        written, finished, replaced = self.unfinished_path(step), self.path(step), self._replaced(step)
        try:
            write_manifest(written, known=entries)
            for parent, _, _ in os.walk(written, topdown=False):
                sync_directory(Path(parent))
            next_latest = self.directory / "latest.tmp"  # written now: after the rename nothing needs space
            write_text_atomically(next_latest, finished.name + "\n")
            if finished.exists():
                os.rename(finished, replaced)
            os.rename(written, finished)
            os.replace(next_latest, self.directory / "latest")
            sync_directory(self.directory)
        except OSError as error:
            raise self.failed(step, error) from error
        self._broken_steps.discard(step)
        self._delete([replaced], "the replaced checkpoint")
        self._apply_retention(step)
        return finished

    def abandon(self, step: int) -> None:
        """Remove what begin(step) started; a file system that refuses is logged, as clean() will come back to
        it."""
        self._delete([self.unfinished_path(step)], "the abandoned checkpoint")

    def failed(self, step: int, error: BaseException) -> SaveError:
        """Abandon `step` and return the error to raise after `error` hit a save between begin() and
        publish().

        The message names the cause (the OSError inside, if there is one), the path, the space left and the
        last good checkpoint.
        """
        cause = os_error_inside(error) or error
        free = _gib(shutil.disk_usage(self.directory).free) if self.directory.exists() else "nothing"
        self.abandon(step)
        if self._replaced(step).exists() and not self.path(step).exists():
            os.rename(self._replaced(step), self.path(step))
        # torch's writer notices a disk that takes only a part of its data by the position alone.
        full = cause.errno in _DISK_FULL if isinstance(cause, OSError) else "unexpected pos" in str(cause)
        reason = "the disk is full" if full else f"{type(cause).__name__}: {cause}"
        return SaveError(
            f"the checkpoint of step {step} could not be written to {self.unfinished_path(step)}: {reason} "
            f"({free} free when it failed); {self._last_good()}. "
            f"{'Free some space' if full else 'Remove the cause'} and start the same command again."
        )

    def newest_intact(self, *, check_hashes: bool = True) -> tuple[Path | None, list[tuple[Path, list[str]]]]:
        """The newest checkpoint whose manifest holds, and the newer ones that were skipped with their
        problems.

        `latest` is not consulted: it may be older than the newest rename, and it may point to a rotten
        directory.
        """
        skipped: list[tuple[Path, list[str]]] = []
        for step in reversed(self.steps()):
            problems = verify_manifest(self.path(step), check_hashes=check_hashes)
            if not problems:
                self._broken_steps.discard(step)
                return self.path(step), skipped
            self._broken_steps.add(step)
            skipped.append((self.path(step), problems))
        return None, skipped

    def unfinished_path(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it is published."""
        return self.directory / f"step_{step:08d}.tmp"

    def _replaced(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}{_REPLACED_SUFFIX}"

    def _apply_retention(self, written_step: int) -> None:
        # A checkpoint that is broken, or that would not pass a look at its sizes, does not count among the
        # last N: otherwise N broken ones could push the only good one out.
        keep = {written_step, *islice(self._good_steps_newest_first(), self.keep_last)}
        if self.keep_every is not None:
            keep.update(step for step in self.steps() if step % self.keep_every == 0)
        # What is newer than the step just written belongs to a run that went further and was resumed from
        # before: it is replaced when this run comes to that step, never deleted here.
        old = [self.path(step) for step in self.steps() if step not in keep and step < written_step]
        self._delete(old, "an old checkpoint")

    def _good_steps_newest_first(self) -> Iterator[int]:
        for step in reversed(self.steps()):
            if step not in self._broken_steps and not verify_manifest(self.path(step), check_hashes=False):
                yield step

    def _delete(self, directories: list[Path], what: str) -> None:
        for directory in directories:
            if not directory.exists():
                continue
            try:
                if not directory.name.endswith(".tmp"):
                    unfinished = directory.with_name(directory.name + ".deleted.tmp")
                    os.rename(directory, unfinished)
                    directory = unfinished
                _remove(directory)
            except OSError as error:  # costs space, not the run: the next start tries again
                _log.warning("%s %s could not be deleted: %s", what, directory, error)

    def _last_good(self) -> str:
        for step in self._good_steps_newest_first():
            return f"the last good checkpoint is {self.path(step)}"
        return f"there is no earlier checkpoint in {self.directory}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def os_error_inside(error: BaseException) -> OSError | None:
    """The OSError in a chain of exceptions; writers in other threads or processes wrap what they met."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            return current
        waiting += [linked for linked in (current.__cause__, current.__context__) if linked is not None]
        failures = getattr(current, "failures", None)  # torch's CheckpointException: {rank: (error, stack)}
        if isinstance(failures, dict):
            waiting += [failure[0] for failure in failures.values() if isinstance(failure, tuple) and failure]
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"
