"""The unfinished build on disk: OUTPUT/.build/, and how its files are written.

Every file gets its name only when it is whole, and what a task writes depends on its shard or unit alone. So a build
that is killed anywhere goes on from the files that are there, with any number of tasks, to the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkDirectory:
    """Where everything of an unfinished build lies."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def shard(self, number: int) -> Path:
        """What stage `read` makes of a shard: documents.jsonl.zst, index.arrow, dropped.jsonl, problems.jsonl,
        contamination.jsonl, counts.json."""
        return self.root / "read" / f"{number:06d}"

    def claims(self, shard: int) -> Path:
        """Which ids the records of a shard claim, see `record_claims`."""
        return self.root / "claims" / f"{shard:06d}.claims"

    def losers(self, source: int) -> Path:
        """Which records of a source lost their id to another."""
        return self.root / "losers" / f"{source:04d}"

    @property
    def fates(self) -> Path:
        """Which documents are dropped as duplicates, see `fates`."""
        return self.root / "fates"

    @property
    def signatures(self) -> Path:
        return self.root / "minhash" / "signatures"

    @property
    def pairs(self) -> Path:
        return self.root / "minhash" / "pairs"

    @property
    def clusters(self) -> Path:
        return self.root / "clusters"

    def unit(self, number: int) -> Path:
        """What stage `write` makes of a unit."""
        return self.root / "write" / f"{number:06d}"

    def logs(self, stage: str, tasks: int) -> Path:
        """datatrove's logs and marks of completed tasks. The tasks of another number are others."""
        return self.root / "logs" / f"{stage}-{tasks}"

    def progress(self, stage: str) -> Path:
        return self.root / "progress" / stage


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` at the end, unless the block fails or another process was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        with suppress(OSError):  # a task of a killed build may have finished the same, with the same content
            temporary.rename(path)
        if not path.is_dir():
            raise OSError(f"{temporary} could not become {path}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
