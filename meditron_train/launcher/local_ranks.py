"""Several ranks on this machine, started and watched by one process: what torchrun does, with less output.

The ranks have a session of their own, so that a Ctrl-C or a signal to this process reaches each of them
exactly once. Their exit code survives: 85 for a run that stopped on purpose, 2 for a mistake of the user's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from meditron_train.errors import ExitCode, UserError
from meditron_train.launcher.environment import detect_launcher
from meditron_train.log import get_logger

_log = get_logger(__name__)

# To the ranks as they come; SIGHUP is the end of the terminal, and the ranks know SIGTERM.
_FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}
# After a rank has ended badly: until the others have noticed by themselves, and until they are killed.
_GRACE_S = 15.0
_STOP_GRACE_S = 60.0  # the same after a stop on request, when rank 0 still uploads to W&B (30 s at most)
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def run_ranks(command: Sequence[str], num_ranks: int, *, grace_s: float = _GRACE_S) -> int:
    """Run `command` as `num_ranks` ranks until all have ended.

    Args:
        command: of every rank.
        num_ranks: processes to start.
        grace_s: how long the others may take to end after one has failed.

    Returns:
        The exit code of the run: that of the first rank that ended badly, 1 where a signal killed it.

    Raises:
        UserError: this process is a rank itself.
    """
    _refuse_inside_another_launch(os.environ)
    port = _free_port()
    ranks = [
        subprocess.Popen(
            command,
            env=rank_environment(os.environ, rank, num_ranks, port),
            start_new_session=True,
            preexec_fn=_begin,
        )
        for rank in range(num_ranks)
    ]
    with _forwarding(ranks):
        try:
            return _wait(ranks, grace_s)
        finally:
            _end(ranks, signal.SIGKILL)


def rank_environment(environment: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables of one rank, as torchrun names them. The ranks share the cores: threads are dealt out."""
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {
        "OMP_NUM_THREADS": str(num_threads),
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _refuse_inside_another_launch(environment: Mapping[str, str]) -> None:
    found = detect_launcher(environment)
    if found.kind != "alone" and found.world_size > 1:
        raise UserError(
            f"--processes starts the ranks itself, but this process is one of {found.world_size} that {found.kind} has "
            "started: leave --processes out"
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    first_code: int | None = None
    deadline = 0.0
    while any(rank.poll() is None for rank in ranks):
        if first_code is None:
            first_code = _bad_end(ranks)
            stops = first_code == ExitCode.REQUEUE
            deadline = time.monotonic() + (max(grace_s, _STOP_GRACE_S) if stops else grace_s)
        elif time.monotonic() > deadline:
            _end(ranks, signal.SIGKILL)
        time.sleep(_POLL_S)
    code = _bad_end(ranks) if first_code is None else first_code
    return ExitCode.DONE if code is None else code


def _bad_end(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The exit code of a rank that has ended badly; a signal is named in the log."""
    for number, rank in enumerate(ranks):
        code = rank.poll()
        if code is not None and code < 0:
            _log.error("rank %d was killed by %s", number, signal.Signals(-code).name)
            return ExitCode.FAILED
        if code:
            return code
    return None


def _end(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals to this process go to all ranks while the block runs."""

    def forward(number: int, frame: FrameType | None) -> None:
        _end(ranks, _FORWARDED[signal.Signals(number)])

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _begin() -> None:
    """In the rank: ask to save and stop when the parent is killed (Linux alone), and survive a SIGUSR2 until it can
    answer with its stacks."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
