"""Ranks that one process starts: their place, their end, and the signals that reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from meditron_train.launcher.local_ranks import rank_environment, run_ranks
from tests.long import mostly_long
from tests.refusal import refused

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


def program(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*PLACE, "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_each_rank_knows_its_place(tmp_path):
    text = f"import json; open(f'{tmp_path}/{{rank}}', 'w').write(json.dumps(dict(os.environ)))"
    assert run_ranks(program(text), 3) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["MASTER_ADDR"]) for place in found} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({place["MASTER_PORT"] for place in found}) == 1


def test_threads_are_dealt_out_unless_the_user_has_set_them():
    assert int(rank_environment({}, 0, 10_000, 1)["OMP_NUM_THREADS"]) == 1
    chosen = rank_environment({"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active"}, 0, 2, 1)
    assert (chosen["OMP_NUM_THREADS"], chosen["OMP_WAIT_POLICY"]) == ("3", "active")


@pytest.mark.parametrize("code", mostly_long([1, 2, 85], 2, 85))
def test_the_exit_code_of_the_ranks_survives(code):
    assert run_ranks(program(f"sys.exit({code})"), 2) == code


def test_a_rank_that_waits_for_a_dead_one_is_ended(caplog):
    text = "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(1000)"
    assert run_ranks(program(text), 2, grace_s=0.5) == 1
    assert "rank 1 was killed by SIGKILL" in caplog.text


def test_after_a_stop_on_request_the_others_may_finish(tmp_path):
    text = f"rank == 1 and sys.exit(85)\ntime.sleep(1)\nopen('{tmp_path}/closed', 'w').close()\nsys.exit(85)"
    assert run_ranks(program(text), 2, grace_s=0) == 85
    assert (tmp_path / "closed").exists()


SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")


@pytest.mark.parametrize("sent", mostly_long(SIGNALS, "SIGTERM", "SIGINT", "SIGHUP"))
def test_a_signal_reaches_each_rank_once(tmp_path, sent):
    """Also when the terminal sends it to the whole process group, as Ctrl-C does."""
    received = "SIGTERM" if sent == "SIGHUP" else sent
    rank = (
        "got = []\n"
        f"signal.signal(signal.{received}, lambda *_: got.append(1))\n"
        f"open(f'{tmp_path}/ready{{rank}}', 'w').close()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        f"open(f'{tmp_path}/got{{rank}}', 'w').write(str(len(got)))\n"
        "sys.exit(85)\n"
    )
    parent = (
        f"from meditron_train.launcher.local_ranks import run_ranks; sys.exit(run_ranks({program(rank)}, 2))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {parent}"], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.Signals[sent])
    assert process.wait(60) == 85
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_ranks_start_no_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "x")
    monkeypatch.setenv("MASTER_PORT", "1")
    with refused("--processes", "one of 2 that torchrun has started"):
        run_ranks(program("pass"), 2)
