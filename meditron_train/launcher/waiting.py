"""Wait until all ranks of a training run have arrived.

The log says which ranks are missing, a request to stop is obeyed at once, and a rank that fails before it
arrives notifies the others. torch's own rendezvous waits without a word, in C++, where no signal handler of
Python runs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from meditron_train.errors import Cause, MeditronError, RequeueError, UserError
from meditron_train.launcher.environment import LaunchEnvironment, master_address
from meditron_train.log import get_logger

_log = get_logger(__name__)

_POLL_S = 0.2
_FIRST_WORD_S = 15.0  # then at intervals that double
_REQUEST_TIMEOUT_S = 60.0  # of one question to a store that is there
_TELL_TIMEOUT_S = 10.0


class _Requests(Protocol):
    """What `StopSignals` knows: why this rank should stop, with a cause and a reason, or None."""

    @property
    def requested(self) -> Any: ...


class _Waiting:
    """One wait: logs what it waits for at growing intervals, and ends on a request or at the time limit."""

    def __init__(self, signals: _Requests, timeout_s: float) -> None:
        self._signals, self._timeout_s = signals, timeout_s
        self._start = time.monotonic()
        self._next_word_s = _FIRST_WORD_S

    def go_on(self, what: str) -> None:
        """Sleep for a moment.

        Raises:
            RequeueError: the rank should stop.
            MeditronError: the time limit is reached.
        """
        request = self._signals.requested
        if request is not None:
            raise RequeueError(f"stopped by {request.reason} while waiting for {what}", cause=request.cause)
        waited_s = time.monotonic() - self._start
        if waited_s > self._timeout_s:
            raise MeditronError(f"waited {waited_s:.0f} s for {what}, in vain")
        if waited_s > self._next_word_s:
            _log.warning("waiting for %s since %.0f s (at most %.0f s)", what, waited_s, self._timeout_s)
            self._next_word_s *= 2
        time.sleep(_POLL_S)


def join(place: LaunchEnvironment, signals: _Requests, timeout_s: float) -> Store:
    """The store of a run whose ranks have all arrived; collective.

    Raises:
        UserError: MASTER_ADDR is not a machine's name, the port is taken, or another rank failed by the user's mistake.
        RequeueError: a request to stop came first. MeditronError: not all came within `timeout_s`.
    """
    waiting = _Waiting(signals, timeout_s)
    store = own_part(_open(place, waiting))
    with _lost_store(place):
        store.set(f"host/{place.rank}", socket.gethostname())
        if place.rank == 0:
            _wait_for_all(store, place.world_size, waiting)
            store.set("all", "here")
        else:
            while not store.check(["all"]):
                _raise_failure(store)
                waiting.go_on(f"the other ranks, as rank {place.rank} of {place.world_size}")
    return PrefixStore("training", store)


def tell_failure(place: LaunchEnvironment, error: MeditronError) -> None:
    """Tell rank 0, and by it all, that this rank will not come.

    Gives up after a few seconds, without an exception.
    """
    failure = {
        "rank": place.rank,
        "host": socket.gethostname(),
        "message": str(error),
        "user": isinstance(error, UserError),
        "cause": error.cause,
    }
    deadline = time.monotonic() + _TELL_TIMEOUT_S
    address = master_address(place)
    while time.monotonic() < deadline:
        if not _answers(address, place.master_port):
            time.sleep(_POLL_S)
            continue
        with suppress(RuntimeError):
            own_part(_client(address, place.master_port)).set("failure", json.dumps(failure))
        return


def _open(place: LaunchEnvironment, waiting: _Waiting) -> Store:
    address, port = master_address(place), place.master_port
    if holds_store(place):
        try:
            return TCPStore(
                address, port, None, True, timedelta(seconds=_REQUEST_TIMEOUT_S), wait_for_workers=False
            )
        except RuntimeError as error:  # torch's DistNetworkError
            if not _is_free(port):
                raise UserError(
                    f"port {port} of this machine is taken by another program: set MASTER_PORT to a free one, on all "
                    "ranks"
                ) from None
            raise MeditronError(f"the ranks cannot meet at {address}:{port}: {_first_line(error)}") from None
    while not _answers(address, port):
        waiting.go_on(f"rank 0 at {address}:{port}")
    with _lost_store(place):
        return _client(address, port)


def holds_store(place: LaunchEnvironment) -> bool:
    """Whether this rank makes the store; torchrun's agent may have one at the address already."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def own_part(store: Store) -> Store:
    """torchrun's store outlives its ranks: each of its restarts begins with none of the keys of the one before."""
    return PrefixStore(f"meditron-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _client(address: str, port: int) -> Store:
    return TCPStore(address, port, None, False, timedelta(seconds=_REQUEST_TIMEOUT_S), wait_for_workers=False)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _wait_for_all(store: Store, world_size: int, waiting: _Waiting) -> None:
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"host/{rank}"])]:
        if store.check(["failure"]):
            time.sleep(5 * _POLL_S)  # the store ends with this process, and the others must have read it
        _raise_failure(store)
        waiting.go_on(f"{_ranks(missing)} of {world_size}")


def _raise_failure(store: Store) -> None:
    if not store.check(["failure"]):
        return
    failure = json.loads(store.get("failure"))
    kind = UserError if failure["user"] else MeditronError
    raise kind(
        f"rank {failure['rank']} on host {failure['host']}: {failure['message']}",
        cause=Cause(failure["cause"]),
    )


@contextmanager
def _lost_store(place: LaunchEnvironment) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistError
        raise MeditronError(
            f"rank 0 at {place.master_addr}:{place.master_port} has gone: {_first_line(error)}"
        ) from None


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
