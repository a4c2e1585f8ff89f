"""The manifest of a checkpoint directory: size and SHA-256 of every file, so that "intact" is a fact and not
a hope."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import open_regular, read_json, replace_text

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "meditron-train-manifest/1"
SIGNATURE_NAME = "model.sig"  # of a published directory: it signs the manifest, which so cannot name it
CONVERSION_NAME = ".conversion.json"  # of workspace.py; a kill just after its last rename leaves it there
# Files that may lie beside those of the manifest.
_NOT_LISTED = {MANIFEST_NAME, SIGNATURE_NAME, CONVERSION_NAME}
# What `hf download --local-dir` and git leave beside the files that they fetch.
_OF_DOWNLOADS = (".cache/huggingface/", ".git/", ".gitattributes")
_MAX_BYTES = 256 << 20
_MAX_LISTED = 10
_BLOCK_BYTES = 4 * 1024 * 1024
_NUM_THREADS = min(16, 2 * (os.cpu_count() or 1))  # hashlib and read() both let go of the GIL


@dataclass(frozen=True)
class TensorEntry:
    """One Hugging Face tensor in a manifest: dtype as config.json spells it ("bfloat16"), and shape."""

    dtype: str
    shape: tuple[int, ...]


def write_manifest(
    directory: Path,
    *,
    known: Mapping[str, Mapping[str, int | str]] | None = None,
    extra: Mapping[str, Any] | None = None,
    leave_out: Collection[str] = (),
) -> dict:
    """Hash every file under `directory` (recursively) and write `manifest.json` beside them, atomically.

    Every file is also fsynced, so what the manifest vouches for is on the disk before the manifest is.

    Args:
        directory: the checkpoint.
        known: entries of files that were hashed and synced while they were written.
        extra: further keys of the manifest.
        leave_out: files that do not belong to the checkpoint.

    Returns:
        The manifest: {"format", "hash": "sha256", "files": {relative path: {"num_bytes", "sha256"}}, …}.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    known = known or {}
    names = sorted(_file_names(directory) - {MANIFEST_NAME, *leave_out})
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        described = pool.map(lambda name: describe_file(directory / name, sync=True), unknown)
        entries = {**known, **dict(zip(unknown, described, strict=True))}
    files = {name: dict(entries[name]) for name in names}
    manifest = {"format": MANIFEST_FORMAT, "hash": "sha256", "files": files, **(extra or {})}
    replace_text(directory / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory: None without one, empty when it is damaged (which `verify_manifest` says)."""
    if not os.path.lexists(directory / MANIFEST_NAME):  # a pipe in its place is damage
        return None
    try:
        manifest = read_json(directory / MANIFEST_NAME, _MAX_BYTES)
        return manifest if isinstance(manifest["files"], dict) else {}
    except (UserError, KeyError, TypeError):
        return {}


def read_tensor_hashes(directory: Path) -> dict[str, str]:
    """Hugging Face name -> SHA-256 of the tensor's bytes, from a converted directory's manifest; empty without."""
    try:
        tensors = read_json(directory / MANIFEST_NAME, _MAX_BYTES)["tensors"]
        return {name: str(entry["sha256"]) for name, entry in tensors.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def verify_manifest(
    directory: Path, *, check_hashes: bool = True, unhashed: Collection[str] = ()
) -> list[str]:
    """What is wrong with a finished checkpoint directory, one line per problem; an empty list means intact.

    Finds missing, additional, cut off and changed files; bad files never cause an exception. Sizes are
    compared first: a file of the wrong size is not hashed. What a download adds beside the files is no problem.

    Args:
        directory: the checkpoint.
        check_hashes: False: stop after the sizes (fast, but blind to flipped bits).
        unhashed: files for which to stop there.
    """
    if not os.path.lexists(directory / MANIFEST_NAME):
        return [f"{MANIFEST_NAME} is missing"]
    try:
        manifest = read_json(directory / MANIFEST_NAME, _MAX_BYTES)
        expected = {name: (int(e["num_bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        found = _file_names(directory) - _NOT_LISTED
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return [f"{MANIFEST_NAME} cannot be read: {error!r}"]
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} is not in the manifest" for name in _beside(found, expected)]
    right_size = []
    for name in sorted(expected.keys() & found):
        try:
            status = (directory / name).stat()
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device never ends
            problems.append(f"{name} is not a file")
            continue
        num_bytes = status.st_size
        if num_bytes == expected[name][0] and name in unhashed:
            continue
        if num_bytes == expected[name][0]:
            right_size.append(name)
        else:
            problems.append(f"{name} has {num_bytes} bytes instead of {expected[name][0]}")
    if check_hashes:
        problems += _changed_files(directory, right_size, expected)
    return problems


def added_files(directory: Path) -> list[str]:
    """The files that someone has put beside those of the manifest, which `verify_manifest` reports, too."""
    named = (read_manifest(directory) or {}).get("files", {})
    try:
        return _beside(_file_names(directory) - _NOT_LISTED, named) if named else []
    except OSError:
        return []


def require_intact(directory: Path, *, check_hashes: bool = True, unhashed: Collection[str] = ()) -> None:
    """Check that the finished checkpoint is as it was written.

    Raises:
        UserError: it is not; the message has the lines of `verify_manifest`.
    """
    if problems := verify_manifest(directory, check_hashes=check_hashes, unhashed=unhashed):
        raise not_intact(directory, problems)


def not_intact(directory: Path, problems: Sequence[str]) -> UserError:
    """The error that says what is wrong with a checkpoint, one line per problem."""
    lines = [f"{directory} is not an intact checkpoint:", *problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"and {len(problems) - _MAX_LISTED} more")
    return UserError("\n  ".join(lines))


def _beside(found: set[str], listed: Collection[str]) -> list[str]:
    """The files that are not listed, ascending, without what a download adds."""

    def is_of_a_download(name: str) -> bool:
        return any(
            name == place or (place.endswith("/") and name.startswith(place)) for place in _OF_DOWNLOADS
        )

    return [name for name in sorted(found - set(listed)) if not is_of_a_download(name)]


def _file_names(directory: Path) -> set[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would otherwise silently leave out what it cannot list

    names: set[str] = set()
    for parent, _, files in os.walk(directory, onerror=fail):
        names.update((Path(parent) / file).relative_to(directory).as_posix() for file in files)
    return names


def describe_file(path: Path, *, sync: bool = False) -> dict[str, int | str]:
    """{"num_bytes", "sha256"} of a file; with `sync`, it is on the disk afterwards.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open_regular(path) as file:
        while block_bytes := file.readinto(buffer):
            digest.update(buffer[:block_bytes])
            num_bytes += block_bytes
        if sync:
            os.fsync(file.fileno())
    return {"num_bytes": num_bytes, "sha256": digest.hexdigest()}


def _changed_files(directory: Path, names: Iterable[str], expected: dict[str, tuple[int, str]]) -> list[str]:
    def problem_of(name: str) -> str | None:
        try:
            sha256 = describe_file(directory / name)["sha256"]
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}"
        if sha256 != expected[name][1]:
            return f"{name} has changed: SHA-256 {str(sha256)[:12]}… instead of {expected[name][1][:12]}…"
        return None

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [problem for problem in pool.map(problem_of, names) if problem]
