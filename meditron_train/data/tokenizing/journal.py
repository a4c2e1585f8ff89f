"""The unfinished part of a tokenization on disk, and how far it is valid.

PREFIX.tokenizing/: bin (token ids), sizes (int32 per document), ids.jsonl, loss_mask.bin (of conversations), and
state.json, replaced whole at every save: the settings and how far the others are valid. What lies beyond that is cut
off when the run is continued.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from meditron_train.errors import UserError
from meditron_train.files import is_disk_full, read_json_object, replace_text
from meditron_train.log import get_logger

_log = get_logger(__name__)

_DATA_FILES = ("bin", "sizes", "ids.jsonl", "loss_mask.bin")


def _new_counts() -> dict[str, int]:
    return {"documents": 0, "tokens": 0, "empty_documents": 0, "bad_lines": 0}


@dataclass
class Tally:
    """How much has been done; counts by source file in `sources`."""

    sources: list[dict[str, int]]
    num_chunks: int = 0
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_DATA_FILES, 0))
    has_ids: bool = False

    def _total(self, what: str) -> int:
        return sum(counts[what] for counts in self.sources)

    @property
    def num_documents(self) -> int:
        return self._total("documents")

    @property
    def num_tokens(self) -> int:
        return self._total("tokens")

    @property
    def num_empty(self) -> int:
        return self._total("empty_documents")

    @property
    def num_bad_lines(self) -> int:
        return self._total("bad_lines")

    def add_bad_line(self, source: int) -> None:
        self.sources[source]["bad_lines"] += 1


class WorkDirectory:
    """PREFIX.tokenizing/, held by one process at a time.

    Entering it finds the last valid state of an interrupted run with the same settings (`progress`), or
    starts from scratch. Left by an error, it stays where there is something to continue from.

    Raises:
        UserError: it cannot be made, another process works there, or the settings differ and `may_discard`
            does not allow throwing that run away.
    """

    def __init__(self, prefix: Path | str, settings: dict[str, Any], *, may_discard: bool) -> None:
        self.path = Path(f"{prefix}.tokenizing")
        self._settings, self._may_discard = settings, may_discard
        self._files: dict[str, IO[bytes]] = {}
        self.publishing = False
        self._is_saved = False  # whether there is something to continue from
        self.progress = self._no_progress()

    def _no_progress(self) -> Tally:
        return Tally([_new_counts() for _ in self._settings["sources"]])

    def __enter__(self) -> WorkDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._files["lock"] = open(self.path / "lock", "wb")
        except OSError as error:
            if is_disk_full(error):
                raise
            raise UserError(
                f"cannot write into {self.path} ({error.strerror}: {error.filename}): give another --output"
            ) from error
        try:
            self._lock()
            self._load()
            if not self.publishing:
                for name in _DATA_FILES:
                    self._files[name] = open(self.path / name, "ab")
                self._cut()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._close()
        if kind is not None and not self._is_saved and self.path.exists():
            self.discard()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is tokenizing into {self.path}: wait for it, or use another --output"
            ) from error

    def _load(self) -> None:
        if not (self.path / "state.json").is_file():
            return
        try:
            state = read_json_object(self.path / "state.json")
            settings, publishing = state["settings"], state["publishing"] is True
            differing = self._differing(settings)
            progress = Tally(**state["progress"])
            is_whole = publishing or self._is_on_disk(progress)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            if not self._may_discard:
                raise UserError(
                    f"{self.path / 'state.json'} is not what an interrupted run leaves ({error}): use --overwrite to "
                    "discard it"
                ) from None
            settings, is_whole = None, False
        if settings != self._settings:
            if not self._may_discard:
                raise UserError(
                    f"{self.path} holds an interrupted run with other settings ({'; '.join(differing)}). "
                    "Repeat its command to continue it, or use --overwrite to discard it"
                )
            (self.path / "state.json").unlink()
        elif is_whole:
            self.progress, self.publishing, self._is_saved = progress, publishing, True
        else:
            _log.warning("%s is incomplete: starting from scratch", self.path)

    def _cut(self) -> None:
        """Cut the files off where the progress ends."""
        for name in _DATA_FILES:
            self._files[name].truncate(self.progress.num_bytes[name])

    def restart(self) -> None:
        """Forget what has been done."""
        self.progress = self._no_progress()
        self._is_saved = False
        (self.path / "state.json").unlink(missing_ok=True)
        self._cut()

    def _differing(self, found: dict[str, Any]) -> list[str]:
        """What the settings of an interrupted run have otherwise."""
        differing = [
            f"{key}: {found['options'].get(key)!r}, now {value!r}"
            for key, value in self._settings["options"].items()
            if found["options"].get(key) != value
        ]
        if found["vocabulary"] != self._settings["vocabulary"]:
            differing.append("the tokenizer's vocabulary changed")
        if found["sources"] != self._settings["sources"]:
            differing.append("the files changed")
        if found.get("chat_template") != self._settings["chat_template"]:
            differing.append("the chat template changed")
        return differing

    def _is_on_disk(self, progress: Tally) -> bool:
        paths = {name: self.path / name for name in _DATA_FILES}
        return all(
            path.is_file() and path.stat().st_size >= progress.num_bytes[name] for name, path in paths.items()
        )

    def append(
        self,
        source: int,
        tokens: bytes,
        sizes: np.ndarray,
        ids: bytes,
        loss_mask: bytes,
        *,
        has_ids: bool,
        num_empty: int,
    ) -> None:
        """Add the documents of the next chunk, which came from the file number `source`."""
        for name, content in zip(_DATA_FILES, (tokens, sizes.tobytes(), ids, loss_mask), strict=True):
            self._files[name].write(content)
            self.progress.num_bytes[name] += len(content)
        counts = self.progress.sources[source]
        counts["documents"] += len(sizes)
        counts["tokens"] += int(sizes.sum(dtype=np.int64))
        counts["empty_documents"] += num_empty
        self.progress.has_ids |= has_ids
        self.progress.num_chunks += 1

    def save(self) -> None:
        """Make everything appended so far survive a kill and a power cut."""
        for name in _DATA_FILES:
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._write_state()

    def _write_state(self) -> None:
        state = {"settings": self._settings, "progress": asdict(self.progress), "publishing": self.publishing}
        replace_text(self.path / "state.json", json.dumps(state))
        self._is_saved = True

    def publish(self, targets: dict[str, Path]) -> dict[str, Any]:
        """Move the finished files to their names (the last one makes the dataset whole) and remove the directory.

        If it is interrupted, the next run does it again.

        Returns:
            The content of meta.json.
        """
        if not self.publishing:
            for name, is_there in (
                ("ids.jsonl", self.progress.has_ids),
                ("loss_mask.bin", self.progress.num_bytes["loss_mask.bin"] > 0),
            ):
                if not is_there:
                    (self.path / name).unlink(missing_ok=True)
            for name in ("idx", "meta.json"):
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())
            for target in reversed(targets.values()):  # an older dataset stops being whole first
                target.unlink(missing_ok=True)
            self.publishing = True
            self._write_state()
        for name, target in targets.items():
            if (self.path / name).exists():
                os.replace(self.path / name, target)
        meta = json.loads(targets["meta.json"].read_text(encoding="utf-8"))
        self.discard()
        return meta

    def discard(self) -> None:
        """Remove the directory and everything in it."""
        self._close()  # network file systems keep open files
        shutil.rmtree(self.path)
