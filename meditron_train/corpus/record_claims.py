"""Who keeps an id that several records claim: decided for all files at once, in memory that does not grow with them.

Three steps, each of which may run on its own:

1. `write_claims`, for each shard: the ids its records claim, sorted in runs of a bounded number.
2. `resolve`, once: merges the runs by ranges of keys and writes for each shard the positions that lost.
3. `load_losers`, for each shard: what `read` needs to leave them out. It is small, so that shards are read
   independently, in any order and number of processes, with the same result.

The rule. Records are ordered by shard, then by position. For each id and version the last record counts; a deletion is
such a record. Of the versions that are left, the highest wins. The loser is reported as DELETED, as SUPERSEDED (by a
higher version, or by a record of a later shard that revises earlier ones), and otherwise as DUPLICATE_ID.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from meditron_train.corpus.document import Reason, Shard

RUN_CLAIMS = 1 << 19
"""Claims that are sorted in memory at a time."""
RANGE_CLAIMS = 1 << 20
"""Claims that are resolved in memory at a time, about."""
_DELETES, _REVISES = 1, 2
_CLAIM = np.dtype(
    [("key", "<u8"), ("digest", "<u8"), ("version", "<u4"), ("position", "<u4"), ("flags", "<u4")]
)
_LOSS = np.dtype(
    [("position", "<u4"), ("reason", "<u4"), ("shard", "<u4"), ("winner", "<u4"), ("same_text", "<u4")]
)
_REASONS = (Reason.DUPLICATE_ID, Reason.SUPERSEDED, Reason.DELETED)


@dataclass(frozen=True)
class Claim:
    """A record claims to be the document of an id, or deletes it."""

    key: int | str
    """The id. Text is hashed to 64 bits: among 50 million ids two are confused with probability 0.00007."""
    position: int
    """Number of the record in its shard, from 0."""
    version: int = 0
    deletes: bool = False
    revises: bool = False
    """A record of a later shard with the same version is its correction, not a duplicate."""
    digest: int = 0
    """Of the text; 0 where it is not known."""


@dataclass(frozen=True)
class Loss:
    """Why a record is left out, and the record that counts instead."""

    reason: Reason
    shard: str
    position: int
    same_text: bool | None
    """None where it is not known."""

    def __str__(self) -> str:
        other = f"record {self.position} of {self.shard}"
        if self.reason is Reason.DELETED:
            return f"deleted by {other}"
        if self.reason is Reason.SUPERSEDED:
            return f"replaced by {other}"
        text = {True: " with the same text", False: " with different text", None: ""}[self.same_text]
        return f"the same id as {other}{text}, which is kept"


class Losers:
    """The records of one shard that lost their id."""

    def __init__(self, losses: np.ndarray[Any, Any], shards: Sequence[str]) -> None:
        self._losses, self._shards = losses, shards
        self._positions = losses["position"]

    def __len__(self) -> int:
        return len(self._positions)

    def get(self, position: int) -> Loss | None:
        """The loss of the record at a position; None where it is the document of its id."""
        if not len(self):
            return None
        index = int(np.searchsorted(self._positions, position))
        if index == len(self._positions) or self._positions[index] != position:
            return None
        loss = self._losses[index]
        known = {0: False, 1: True}
        return Loss(
            _REASONS[loss["reason"]],
            self._shards[loss["shard"]],
            int(loss["winner"]),
            known.get(int(loss["same_text"])),
        )


NO_LOSERS = Losers(np.empty(0, _LOSS), ())


def text_digest(text: str) -> int:
    """64 bits that are equal for equal texts, never 0."""
    return (
        int.from_bytes(
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        or 1
    )


def write_claims(path: Path, claims: Iterable[Claim]) -> int:
    """Write the claims of a shard, sorted in runs of RUN_CLAIMS.

    Returns:
        Their number.
    """
    remaining, total = iter(claims), 0
    with open(path, "wb") as file:
        while True:
            rows = np.fromiter((_row(claim) for claim in islice(remaining, RUN_CLAIMS)), dtype=_CLAIM)
            if not len(rows):
                return total
            total += len(rows)
            rows[np.argsort(rows["key"], kind="stable")].tofile(file)


def _row(claim: Claim) -> tuple[int, int, int, int, int]:
    key = claim.key if isinstance(claim.key, int) else text_digest(claim.key)
    flags = claim.deletes * _DELETES + claim.revises * _REVISES
    return key, claim.digest, claim.version, claim.position, flags


def resolve(claims: Sequence[Path], shards: Sequence[Shard], directory: Path) -> int:
    """Decide who keeps each id.

    Args:
        claims: what `write_claims` wrote for each shard, in the order of the shards.
        directory: is filled with a file of losses for each shard; it must be empty.

    Returns:
        the number of records that lost.
    """
    runs = [(number, run) for number, path in enumerate(claims) for run in _runs(path)]
    (directory / "shards.json").write_text(json.dumps([shard.name for shard in shards]) + "\n")
    total = 0
    for first, end in _ranges([run for _, run in runs]):
        parts, owners = [], []
        for number, run in runs:
            keys = _Keys(run)
            begin = bisect_left(keys, first) if first is not None else 0
            stop = bisect_left(keys, end, lo=begin) if end is not None else len(run)
            if begin < stop:
                parts.append(np.array(run[begin:stop]))
                owners.append(np.full(stop - begin, number, np.uint32))
        if parts:
            total += _append_losses(np.concatenate(parts), np.concatenate(owners), directory)
    for number in range(len(claims)):
        path = _losses_path(directory, number)
        if path.exists():
            losses = np.fromfile(path, _LOSS)
            losses[np.argsort(losses["position"], kind="stable")].tofile(path)
    return total


def load_losers(directory: Path, number: int) -> Losers:
    """The losers of shard `number` in the order given to `resolve`."""
    path = _losses_path(directory, number)
    if not path.exists():
        return NO_LOSERS
    names = json.loads((directory / "shards.json").read_text())
    return Losers(np.memmap(path, _LOSS, mode="r"), names)


def _losses_path(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.losses"


def _runs(path: Path) -> Iterator[Any]:
    if path.stat().st_size == 0:
        return
    rows = np.memmap(path, _CLAIM, mode="r")
    for start in range(0, len(rows), RUN_CLAIMS):
        yield rows[start : start + RUN_CLAIMS]


class _Keys(Sequence[int]):
    """The keys of a run, for bisection."""

    def __init__(self, run: Any) -> None:
        self._keys = run["key"]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return int(self._keys[index])


def _ranges(runs: Sequence[Any]) -> Iterator[tuple[int | None, int | None]]:
    """Neighboring ranges [first, end) of keys with about RANGE_CLAIMS claims each; None is an open end."""
    total = sum(len(run) for run in runs)
    every = max(1, min(1024, RANGE_CLAIMS // max(1, 4 * len(runs))))
    samples = (
        np.sort(np.concatenate([run["key"][::every] for run in runs])) if runs else np.empty(0, np.uint64)
    )
    count = -(-total // RANGE_CLAIMS)
    cuts = sorted({int(samples[len(samples) * number // count]) for number in range(1, count)})
    bounds = [None, *cuts, None]
    yield from zip(bounds[:-1], bounds[1:], strict=True)


def _append_losses(rows: np.ndarray[Any, Any], owners: np.ndarray[Any, Any], directory: Path) -> int:
    """Resolve the claims of a range of keys.

    Args:
        owners: the shard of each.
    """
    order = np.lexsort((rows["position"], owners, rows["version"], rows["key"]))
    rows, owners = rows[order], owners[order]
    index = np.arange(len(rows))
    new_key = np.r_[True, rows["key"][1:] != rows["key"][:-1]]
    new_version = new_key | np.r_[True, rows["version"][1:] != rows["version"][:-1]]
    deletes = (rows["flags"] & _DELETES) != 0
    # The last record of each id and version, and the last of those that is not a deletion: the winner of the id.
    last = np.r_[np.flatnonzero(new_version)[1:] - 1, len(rows) - 1][np.cumsum(new_version) - 1]
    alive = (last == index) & ~deletes
    winner = np.maximum.reduceat(np.where(alive, index, -1), np.flatnonzero(new_key))[np.cumsum(new_key) - 1]
    lost = np.flatnonzero(~deletes & (winner != index))
    if not len(lost):
        return 0
    deleted = deletes[last[lost]]
    by = np.where(deleted, last[lost], winner[lost])
    revised = ((rows["flags"][by] & _REVISES) != 0) & (owners[by] != owners[lost])
    superseded = revised | (rows["version"][by] != rows["version"][lost])
    losses = np.zeros(len(lost), _LOSS)
    losses["position"], losses["shard"], losses["winner"] = (
        rows["position"][lost],
        owners[by],
        rows["position"][by],
    )
    losses["reason"] = np.where(deleted, 2, np.where(superseded, 1, 0))
    digests, others = rows["digest"][lost], rows["digest"][by]
    losses["same_text"] = np.where((digests == 0) | (others == 0), 2, digests == others)
    for number in np.unique(owners[lost]):
        with open(_losses_path(directory, int(number)), "ab") as file:
            losses[owners[lost] == number].tofile(file)
    return len(lost)
