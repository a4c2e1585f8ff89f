"""Processes that share work without sending each other tensors: they meet at a key-value store, no process group.

Starting one needs a TCP port and no device; a rank that fails notifies the others, and one that dies is noticed by its
silence.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from meditron_train.errors import MeditronError, PassingError, UserError
from meditron_train.launcher.environment import LaunchEnvironment, master_address
from meditron_train.launcher.waiting import holds_store, own_part

_POLL_S = 0.05
_BEAT_S = 5.0
_FAILED = "failed"


class Ranks:
    """One process among several; every method but `check` is collective, in the same order on all ranks.

    Args:
        store: shared by all ranks.
        rank, world_size: place of this process.
        silence_s: how long a rank may give no sign of life before the others give up.
    """

    def __init__(self, store: Store, rank: int, world_size: int, silence_s: float = 300.0) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._silence_s = store, silence_s
        self._number = 0  # of the meeting
        self._beats: dict[int, tuple[bytes, float]] = {}

    def on_first(self, action: Callable[[], Any]) -> None:
        """`action()` on rank 0 while the others wait; if it fails, all ranks do."""
        if self.rank == 0:
            action()
        self._say("first", 0 if self.rank == 0 else None)
        self._wait_for("first", [0])
        self._number += 1

    def gather(self, value: Any) -> list[Any]:
        """The JSON `value` of every rank, in rank order, on every rank."""
        self._say("gather", value)
        values = self._wait_for("gather", range(self.world_size))
        self._number += 1
        return values

    def check(self) -> None:
        """Check on the other ranks.

        Raises:
            UserError, PassingError, MeditronError: one of them has failed, with an error of this kind.
        """
        with _store_calls():
            failed = self._store.check([_FAILED])
            failure = json.loads(self._store.get(_FAILED)) if failed else None
        if failure is not None and failure["rank"] != self.rank:
            kind = _KINDS[failure["kind"]]
            raise kind(f"rank {failure['rank']} failed: {failure['message']}")

    def beat(self) -> None:
        self._store.set(f"beat/{self.rank}", str(time.monotonic()))

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks; the first failure is the one that they hear of."""
        failure = {
            "rank": self.rank,
            "kind": _kind_of(error),
            "message": str(error) or type(error).__name__,
        }
        with suppress(RuntimeError):
            self._store.compare_set(_FAILED, "", json.dumps(failure))

    def leave(self, patience_s: float = 10.0) -> None:
        """Rank 0, which may hold the store, goes last, or after a while."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            others = [f"left/{rank}" for rank in range(1, self.world_size)]
            deadline = time.monotonic() + patience_s
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(others):
                time.sleep(_POLL_S)

    def _say(self, what: str, value: Any) -> None:
        if what == "gather" or self.rank == 0:
            with _store_calls():
                self._store.set(f"{self._number}/{what}/{self.rank}", json.dumps(value))

    def _wait_for(self, what: str, ranks: Any) -> list[Any]:
        values = []
        for rank in ranks:
            key = f"{self._number}/{what}/{rank}"
            while not self._has(key):
                self.check()
                self._listen_to(rank)
                time.sleep(_POLL_S)
            with _store_calls():
                values.append(json.loads(self._store.get(key)))
        return values

    def _has(self, key: str) -> bool:
        with _store_calls():
            return bool(self._store.check([key]))

    def _listen_to(self, rank: int) -> None:
        key, now = f"beat/{rank}", time.monotonic()
        with _store_calls():
            beat = self._store.get(key) if self._store.check([key]) else b""
        last, since = self._beats.get(rank, (None, now))
        if beat != last:
            self._beats[rank] = (beat, now)
        elif now - since > self._silence_s:
            raise PassingError(f"rank {rank} has given no sign of life for {self._silence_s:.0f} s")


_KINDS: dict[str, type[MeditronError]] = {"user": UserError, "passing": PassingError, "other": MeditronError}


def _kind_of(error: BaseException) -> str:
    """Of which kind an error is for the other ranks; an interruption passes."""
    if isinstance(error, UserError):
        return "user"
    return "passing" if isinstance(error, PassingError) or not isinstance(error, Exception) else "other"


@contextmanager
def _store_calls() -> Iterator[None]:
    """The store lies in a process of this launch: without it the launch has ended, and nothing else is wrong."""
    try:
        yield
    except RuntimeError as error:
        raise PassingError(f"the store at rank 0 has gone: {error}") from None


@contextmanager
def meet(place: LaunchEnvironment, timeout_s: float = 600.0) -> Iterator[Ranks | None]:
    """The ranks of a launch; None where there is one process. All leave the block together, or with an error.

    Raises:
        MeditronError: they do not all come within `timeout_s`.
    """
    if place.world_size == 1:
        yield None
        return
    ranks = Ranks(_open_store(place, timeout_s), place.rank, place.world_size)
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(_BEAT_S):
            with suppress(RuntimeError):  # the store is gone: its rank's end is noticed elsewhere
                ranks.beat()

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    with _store_calls():
        ranks.beat()
    thread.start()
    try:
        yield ranks
        ranks.gather(None)
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        stopped.set()
        thread.join()
        ranks.leave()


def _open_store(place: LaunchEnvironment, timeout_s: float) -> Store:
    try:
        store = TCPStore(
            master_address(place),
            place.master_port,
            place.world_size,
            is_master=holds_store(place),
            timeout=timedelta(seconds=timeout_s),
        )
    except (DistError, RuntimeError, ValueError) as error:
        raise MeditronError(
            f"the {place.world_size} ranks could not meet at {place.master_addr}:{place.master_port}: {error}"
        ) from None
    return PrefixStore("meditron-train/convert", own_part(store))
