"""Until all ranks are there: threads of this process play the ranks."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from meditron_train.errors import Cause, MeditronError, RequeueError, UserError
from meditron_train.launcher import waiting
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.launcher.rendezvous import meet
from meditron_train.launcher.waiting import join, tell_failure
from tests.distributed import free_port
from tests.refusal import refused

NOBODY = SimpleNamespace(requested=None)
STOPPED = SimpleNamespace(requested=SimpleNamespace(cause=Cause.TERMINATED, reason="SIGTERM"))


def place(rank: int, world_size: int = 2, **more) -> LaunchEnvironment:
    values = {"master_addr": "127.0.0.1", "master_port": free_port(), "local_world_size": 1, **more}
    return LaunchEnvironment("slurm", rank, world_size, 0, hosts=("n1", "n2"), **values)


def test_all_meet_at_one_store():
    first = place(0, 3)
    places = [dataclasses.replace(first, rank=rank) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda where: join(where, NOBODY, 60), places))
    stores[1].set("x", "y")
    assert stores[2].get("x") == b"y"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_ends_the_wait_at_once(rank):
    start = time.monotonic()
    with pytest.raises(RequeueError, match="stopped by SIGTERM while waiting for rank") as error:
        join(place(rank), STOPPED, 600)
    assert error.value.cause is Cause.TERMINATED and time.monotonic() - start < 30


def test_who_is_waited_for_is_said(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_FIRST_WORD_S", 0.1)
    with pytest.raises(MeditronError, match="for ranks 1, 2 of 3, in vain"):
        join(place(0, 3), NOBODY, 1)
    assert "waiting for ranks 1, 2 of 3 since" in caplog.text


def test_an_unresolvable_name_is_an_error_at_once():
    with refused("MASTER_ADDR is no-such-host.invalid", "cannot resolve"):
        join(place(1, master_addr="no-such-host.invalid"), NOBODY, 600)
    with (
        refused("MASTER_ADDR is no-such-host.invalid", "cannot resolve"),
        meet(place(1, master_addr="no-such-host.invalid")),  # of a conversion
    ):
        pass


def test_a_machine_that_does_not_know_its_own_name_meets_itself():
    first = place(0, master_addr="no-such-host.invalid", local_world_size=2)
    with ThreadPoolExecutor(2) as pool:
        places = [first, dataclasses.replace(first, rank=1)]
        stores = list(pool.map(lambda where: join(where, NOBODY, 60), places))
    assert len(stores) == 2


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError) as error:
            join(place(0, master_port=port), NOBODY, 60)
    assert f"port {port} of this machine is taken" in str(error.value) and "\n" not in str(error.value)
    assert "MASTER_PORT" in str(error.value)


def test_a_rank_that_fails_before_it_comes_tells_the_others():
    first = place(0, 3)
    failed = UserError("there is no file x\n  - here", cause=Cause.CHANGED)
    teller = threading.Thread(target=tell_failure, args=(dataclasses.replace(first, rank=2), failed))
    teller.start()
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(join, dataclasses.replace(first, rank=rank), NOBODY, 60) for rank in range(2)]
        for other in others:
            with refused("rank 2 on host", "there is no file x", "- here"):
                other.result()
    teller.join()
    assert others[0].exception().cause is Cause.CHANGED


def test_without_a_rank_0_nobody_is_told_and_nothing_is_raised(monkeypatch):
    monkeypatch.setattr(waiting, "_TELL_TIMEOUT_S", 0.3)
    tell_failure(place(1), MeditronError("x"))
