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

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from meditron_train.checkpoint.manifest import (
    MANIFEST_NAME,
    describe_file,
    verify_manifest,
    write_manifest,
)
from meditron_train.errors import Cause, SaveError, cause_of
from meditron_train.files import is_disk_full, replace_text, sync_directory
from meditron_train.log import get_logger
from meditron_train.units import format_num_bytes

__all__ = ["MANIFEST_NAME", "CheckpointStore", "verify_manifest", "write_manifest"]

_log = get_logger(__name__)

FINISHED_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED_NAME = re.compile(r"step_\d{8,}(\.replaced|\.deleted)?\.tmp|latest(\.tmp)+")
_RANKS_FILE = re.compile(r"__(\d+)_\d+\.distcp")  # as torch's writers name them
_REPLACED_SUFFIX = ".replaced.tmp"


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
        begin(). What else lies in the directory is not ours."""
        removed = []
        for entry in sorted(
            path for path in self.directory.glob("*.tmp") if _UNFINISHED_NAME.fullmatch(path.name)
        ):
            original = entry.with_name(entry.name.removesuffix(_REPLACED_SUFFIX))
            if entry.name.endswith(_REPLACED_SUFFIX) and not original.exists():
                os.rename(entry, original)  # killed between the two renames of publish(): it is still good
            else:
                _remove(entry)
                removed.append(entry.name)
        return removed

    def check_free_space(self, needed_bytes: int) -> None:
        """Check that the file system has `needed_bytes` left, before anything is written.

        Raises:
            SaveError: it has less.
        """
        free_bytes = self._free_bytes()
        if free_bytes < needed_bytes:
            raise SaveError(
                f"the next checkpoint needs about {format_num_bytes(needed_bytes)}, but {self.directory} has "
                f"{format_num_bytes(free_bytes)} free; {self._last_good()}. Free some space, or lower "
                f"checkpoint.keep_last ({self.keep_last})",
                cause=Cause.DISK,
            )

    def make_room(self, step: int, needed_bytes: int) -> None:
        """Delete the oldest checkpoints that only `keep_last` keeps, where that makes room for the one of `step`.

        The newest good one stays. Nothing is deleted where it would not be enough.

        Args:
            step: of a checkpoint without which the run would lose its last steps.
            needed_bytes: of that checkpoint.
        """
        missing_bytes = needed_bytes - self._free_bytes()
        older = [number for number in self._good_steps_newest_first() if number < step][1:]
        chosen: list[Path] = []
        while missing_bytes > 0 and older:
            oldest = older.pop()
            if self.keep_every is None or oldest % self.keep_every:
                chosen.append(self.path(oldest))
                files = [path for path in chosen[-1].rglob("*") if path.is_file()]
                missing_bytes -= sum(path.stat().st_size for path in files)
        if missing_bytes <= 0:
            for directory in chosen:
                _log.warning("the disk is full: %s makes room for the checkpoint of step %d", directory, step)
            self._delete(chosen, "an old checkpoint")

    def begin(self, step: int) -> Path:
        """An empty directory `step_XXXXXXXX.tmp` to write the checkpoint of `step` into.

        Raises:
            SaveError: the directory cannot be made.
        """
        directory = self.unfinished_path(step)
        try:
            _remove(directory)
            directory.mkdir(parents=True)
        except OSError as error:
            raise self.failed(step, error) from error
        return directory

    def describe_files(self, step: int, writer: int, *, with_shared: bool) -> dict[str, dict[str, int | str]]:
        """Manifest entries of the files that rank `writer` wrote of an unfinished checkpoint, fsynced and hashed.

        Unlike the rest of this class, every rank may call it.

        Args:
            step: of the checkpoint.
            writer: rank whose files are described.
            with_shared: also describe the files of no rank in particular.
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

        Args:
            step: of the checkpoint.
            entries: of files that are hashed and on the disk already.

        Raises:
            SaveError: the disk is full or fails. The leftovers are then removed, and the checkpoint published
                before is untouched.
        """
        written, finished, replaced = self.unfinished_path(step), self.path(step), self._replaced(step)
        try:
            write_manifest(written, known=entries)
            for parent, _, _ in os.walk(written, topdown=False):
                sync_directory(Path(parent))
            next_latest = self.directory / "latest.tmp"  # written now: after the rename nothing needs space
            replace_text(next_latest, finished.name + "\n")
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
        """Abandon `step` after `error` hit a save between begin() and publish().

        Returns:
            The error for the caller to raise. Its message names the cause (the OSError inside, if there is
            one), the path, the space left and the last good checkpoint.
        """
        cause = os_error_inside(error) or error
        free = (
            format_num_bytes(shutil.disk_usage(self.directory).free) if self.directory.exists() else "nothing"
        )
        self.abandon(step)
        if self._replaced(step).exists() and not self.path(step).exists():
            os.rename(self._replaced(step), self.path(step))
        # torch's writer notices a disk that takes only a part of its data by the position alone.
        full = is_disk_full(cause) if isinstance(cause, OSError) else "unexpected pos" in str(cause)
        reason = "the disk is full" if full else f"{type(cause).__name__}: {cause}"
        return SaveError(
            f"the checkpoint of step {step} could not be written to {self.unfinished_path(step)}: {reason} "
            f"({free} free when it failed); {self._last_good()}. "
            f"{'Free some space' if full else 'Remove the cause'} and start the same command again",
            cause=Cause.DISK if full else cause_of(cause) if isinstance(cause, OSError) else Cause.FAILED,
        )

    def newest_intact(self, *, check_hashes: bool = True) -> tuple[Path | None, list[tuple[Path, list[str]]]]:
        """The newest checkpoint whose manifest holds, and the newer ones that were skipped with their problems.

        `latest` is not consulted: it may be older than the newest rename, and it may point to a damaged
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

    def _free_bytes(self) -> int:
        candidates = (self.directory, *self.directory.absolute().parents)
        return shutil.disk_usage(next(path for path in candidates if path.exists())).free

    def _last_good(self) -> str:
        for step in self._good_steps_newest_first():
            return f"the last good checkpoint is {self.path(step)}"
        return f"there is no earlier checkpoint in {self.directory}"


def step_of(checkpoint: Path) -> int:
    """The step of a finished checkpoint, as its name says."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint below `directory` whose files are there in full, without a look at their hashes."""
    return CheckpointStore(directory, keep_last=1, keep_every=None).newest_intact(check_hashes=False)[0]


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
