"""The directory in which a conversion is written, under another name, until one rename publishes it.

`TARGET.tmp` holds, beside the files, what the conversion is (`.conversion.json`) and which files are finished, with
their hashes (`.finished_RANK.jsonl`). After a kill at any moment the same command finds its finished files there and
writes the others; a different conversion starts from scratch. What has the final name is complete. `.conversion.json`
alone makes a directory ours to clear, so it is there before any file and goes after all of them, or after the last
rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from meditron_train.checkpoint.convert.stream import WrittenFile
from meditron_train.checkpoint.manifest import (
    CONVERSION_NAME,
    describe_file,
    write_manifest,
)
from meditron_train.checkpoint.planned import PlannedFile
from meditron_train.errors import WRONG_PATH, MeditronError, PassingError, UserError
from meditron_train.files import is_disk_full, overlap, read_json_object, replace_text, sync_directory
from meditron_train.log import get_logger
from meditron_train.units import format_num_bytes

_log = get_logger(__name__)

_FORMAT = "meditron-train-conversion/1"
_FINISHED = ".finished_"
_LOCK = ".lock"
_T = TypeVar("_T")


class Ranks(Protocol):
    """The processes that convert together on one file system."""

    rank: int
    world_size: int

    def on_first(self, action: Any) -> None:
        """`action()` on rank 0 while the others wait; a MeditronError of it ends all of them."""

    def gather(self, value: Any) -> list[Any]:
        """The JSON `value` of every rank, in rank order, on every rank.

        Raises:
            MeditronError: a rank has failed.
        """

    def check(self) -> None:
        """Check on the other ranks.

        Raises:
            MeditronError: one of them has failed.
        """


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def on_first(self, action: Any) -> None:
        action()

    def gather(self, value: _T) -> list[_T]:
        return [value]

    def check(self) -> None:
        pass


class Workspace:
    """What is written and what is finished in `TARGET.tmp`; from several threads and ranks at once."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self._journal = directory / f"{_FINISHED}{rank:05d}.jsonl"
        self._lock = threading.Lock()
        self._known = _read_journals(directory)

    def finished(self, plan: PlannedFile) -> WrittenFile | None:
        """The record of a file that an earlier attempt has finished and that is still what it was, by its hash."""
        entry = self._known.get(plan.name)
        path = self.directory / plan.name
        if entry is None or entry.num_bytes != plan.num_bytes or not path.is_file():
            return None
        found = describe_file(path)
        return entry if (found["num_bytes"], found["sha256"]) == (entry.num_bytes, entry.sha256) else None

    def record(self, name: str, written: WrittenFile) -> None:
        """Note durably that a file, already synced, is finished."""
        line = json.dumps({"name": name, **asdict(written)}) + "\n"
        with self._lock, self._journal.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def workspace(
    target: str | Path, plans: Sequence[PlannedFile], identity: Mapping[str, Any], ranks: Ranks
) -> Iterator[Workspace]:
    """The workspace of a conversion; `publish` ends it. Collective.

    An error removes the workspace, so that a full disk does not stay full. An interruption, a source that cannot
    be read at the moment, or a rank that has gone, leaves it for the next attempt.

    Args:
        target: the directory to become.
        plans: the files.
        identity: everything that decides what the files will hold.
        ranks: the processes that share the work.

    Raises:
        UserError: the target exists and is not empty, `.tmp` is someone else's or is being written, or the
            path is unusable.
        MeditronError: the disk is full or too small.
    """
    target = _final(target)
    temporary = _temporary(target)
    lock: list[IO[str]] = []
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    try:
        try:
            ranks.on_first(lambda: lock.append(_prepare(target, temporary, digest, plans)))
            yield Workspace(temporary, ranks.rank)
        except OSError as error:
            raise _explained(error, target) from error
    except PassingError:
        raise
    except Exception:
        if lock:  # only rank 0 removes, and only what it holds
            _remove(temporary)
        raise
    finally:
        for file in lock:
            file.close()


def publish(
    work: Workspace, target: str | Path, written: Mapping[str, WrittenFile], manifest: Mapping[str, Any]
) -> None:
    """Complete the workspace with manifest.json and give it its final name. Rank 0 only."""
    target, temporary = _final(target), work.directory
    known: dict[str, dict[str, int | str]] = {
        name: {"num_bytes": file.num_bytes, "sha256": file.sha256} for name, file in written.items()
    }
    journals = sorted(temporary.glob(f"{_FINISHED}*"))
    own = {CONVERSION_NAME, _LOCK, *(path.name for path in journals)}
    write_manifest(temporary, known=known, extra=manifest, leave_out=own)
    for path in journals:
        path.unlink()
    for parent, _, _ in os.walk(temporary, topdown=False):
        sync_directory(Path(parent))
    # Late: from here on another process could take it for abandoned.
    (temporary / _LOCK).unlink(missing_ok=True)
    temporary.rename(target)  # an empty directory of that name is replaced
    (target / CONVERSION_NAME).unlink()
    sync_directory(target)
    sync_directory(target.parent)


def require_absent(directory: str | Path, *inputs: str | Path | None) -> None:
    """Check that `directory` does not exist, or is an empty directory that a rename can replace.

    Args:
        directory: of the output.
        inputs: what it must lie apart from, as it would change them; None: no input.

    Raises:
        UserError: something is there, or it overlaps an input.
    """
    directory = Path(directory)
    final = _final(directory)
    for place in (final, _temporary(final)):
        for source in inputs:
            if source is not None and (how := overlap(place, Path(source))):
                raise UserError(f"{place} {how} {source}, which would change it. Name a directory elsewhere")
    if directory.is_dir():
        if os.path.ismount(directory):
            raise UserError(
                f"{directory} is a mount point, which cannot be replaced. Name a directory inside it"
            )
        if any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not empty. Name a new directory, or remove this one")
    elif os.path.lexists(directory):
        raise UserError(f"{directory} exists and is not a directory. Name a new directory")


def _final(target: str | Path) -> Path:
    """Where the directory will lie: a rename onto a link to an empty directory would fail."""
    return Path(os.path.realpath(target))


def _temporary(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


def _prepare(target: Path, temporary: Path, digest: str, plans: Sequence[PlannedFile]) -> IO[str]:
    """Make or take over the workspace; returns its locked lock file."""
    require_absent(target)
    existed = os.path.lexists(temporary)
    if existed and not _is_ours(temporary):
        raise UserError(f"{temporary} is in the way, and is not an interrupted conversion. Move it away")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = _lock(temporary)
    try:
        if existed and _identity_of(temporary) != digest:
            _log.info("starting from scratch: %s holds parts of another conversion", temporary)
            _clear(temporary, keep=set())
        elif existed:
            _log.info("continuing with what an interrupted conversion left in %s", temporary)
            _clear(temporary, keep={plan.name.split("/")[0] for plan in plans})
        _check_free_space(temporary, plans)
        identity = json.dumps({"format": _FORMAT, "sha256": digest}) + "\n"
        replace_text(temporary / CONVERSION_NAME, identity)
    except BaseException:
        if not existed:
            _remove(temporary)
        lock.close()
        raise
    return lock


def _lock(temporary: Path) -> IO[str]:
    """Hold the workspace; the kernel lets go of it when the process dies, however it dies."""
    file = (temporary / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{temporary} is being written by another process. Wait for it, or name another directory"
        ) from None
    except OSError:  # a file system without locks: two conversions into one directory are the user's to avoid
        pass
    return file


def _is_ours(temporary: Path) -> bool:
    """Whether a conversion made it: it says which, or is still empty of anything that could be someone else's."""
    if temporary.is_symlink() or not temporary.is_dir():
        return False
    started = {_LOCK, CONVERSION_NAME + ".tmp"}
    return _identity_of(temporary) is not None or {path.name for path in temporary.iterdir()} <= started


def _identity_of(temporary: Path) -> str | None:
    with suppress(UserError, KeyError):
        identity = read_json_object(temporary / CONVERSION_NAME)
        return str(identity["sha256"]) if identity["format"] == _FORMAT else None
    return None


def _clear(temporary: Path, keep: set[str]) -> None:
    """Remove all but what makes it ours and, where files are kept, the journals that say which are finished."""
    for path in temporary.iterdir():
        if path.name in (_LOCK, CONVERSION_NAME, *keep) or (keep and path.name.startswith(_FINISHED)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(temporary: Path) -> None:
    """All of it, as far as the disk lets us."""
    with suppress(OSError):
        _clear(temporary, keep=set())
        for name in (CONVERSION_NAME, _LOCK):
            (temporary / name).unlink(missing_ok=True)
        temporary.rmdir()


def _read_journals(temporary: Path) -> dict[str, WrittenFile]:
    known: dict[str, WrittenFile] = {}
    for path in sorted(temporary.glob(f"{_FINISHED}*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a killed attempt may be torn
                entry = json.loads(line)
                name = entry.pop("name")
                known[name] = WrittenFile(**entry)
    return known


def _check_free_space(temporary: Path, plans: Sequence[PlannedFile]) -> None:
    """For what is still to be written: unfinished files of an earlier attempt are written over."""
    needed = sum(plan.num_bytes for plan in plans)
    for plan in plans:
        with suppress(FileNotFoundError):
            status = (temporary / plan.name).stat()
            needed -= min(plan.num_bytes, status.st_blocks * 512)
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise MeditronError(
            f"{temporary.parent} has {format_num_bytes(free)} free, but {format_num_bytes(needed)} would be written. "
            "Free some space or write elsewhere"
        )


def _explained(error: OSError, target: Path) -> MeditronError:
    if is_disk_full(error):
        return MeditronError(f"no space left on the disk of {target}: nothing was written")
    if error.errno in WRONG_PATH:
        return UserError(f"{target} cannot be written: {error}. Name another directory")
    return MeditronError(f"writing {target} failed: {error}. Nothing was written")
