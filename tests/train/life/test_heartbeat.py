from __future__ import annotations

import json
import os
import threading
import time

import pytest

from meditron_train.config.schema import ResilienceSection
from meditron_train.errors import Cause
from meditron_train.report.status import read_requeue
from meditron_train.train.life.heartbeat import (
    Heartbeat,
    HeartbeatWriter,
    Pulse,
    forget_heartbeats,
    read_heartbeats,
    stragglers,
)
from meditron_train.train.life.watchdog import Watchdog


def beat(rank: int, **values) -> Heartbeat:
    usual = dict(
        host=f"n{rank}", pid=1, step=5, phase="training step", waits_for_others=True, where="engine.py:1"
    )
    return Heartbeat(rank=rank, **{**usual, **values})


@pytest.mark.parametrize(
    ("beats", "said"),
    [
        ([beat(0), beat(1, age_s=60.0)], ["rank 1 on host n1 gives no sign of life for 60 s"]),
        ([beat(0)], ["rank 1 left no sign of life"]),
        ([beat(0), beat(1, step=4)], ["rank 1 on host n1 is at step 4, others at 5"]),
        (
            [beat(0), beat(1, waits_for_others=False)],
            ["rank 1 on host n1 is busy: training step at engine.py:1"],
        ),
        ([beat(0, waits_for_others=False), beat(1, phase="waiting for data", waits_for_others=False)], []),
        ([beat(0), beat(1)], []),
    ],
)
def test_who_keeps_the_others_waiting(beats, said):
    found = stragglers({one.rank: one for one in beats}, 2, stale_after_s=30)
    assert len(found) == len(said)
    assert all(phrase in line for phrase, line in zip(said, found, strict=True))


def test_ages_are_those_of_the_files(tmp_path):
    for rank in range(2):
        HeartbeatWriter(tmp_path, rank, Pulse(), interval_s=60).write()
    file = tmp_path / "heartbeats" / "rank_00001.json"
    os.utime(file, (file.stat().st_mtime - 100, file.stat().st_mtime - 100))
    beats = read_heartbeats(tmp_path)
    assert beats[0].age_s == 0 and beats[1].age_s == pytest.approx(100, abs=1)
    assert beats[0].pid == os.getpid()
    forget_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"rank": 1}', "9" * 5000, '{"rank": 1, "more": 2}']
)
def test_what_no_rank_wrote_is_left_out(tmp_path, content):
    HeartbeatWriter(tmp_path, 0, Pulse(), interval_s=60).write()
    (tmp_path / "heartbeats" / "rank_00001.json").write_text(content)
    os.mkfifo(tmp_path / "heartbeats" / "rank_00002.json")
    whole = json.loads((tmp_path / "heartbeats" / "rank_00000.json").read_text())
    (tmp_path / "heartbeats" / "rank_00003.json").write_text(json.dumps({**whole, "rank": "3"}))
    assert read_heartbeats(tmp_path).keys() == {0}


def test_time_without_a_step_goes_on_from_one_part_of_a_step_to_the_next():
    pulse = Pulse()
    pulse.enter("waiting for data")
    since = pulse.since
    time.sleep(0.002)
    pulse.enter("training step")
    assert pulse.since == since
    pulse.enter("saving")
    assert pulse.since > since
    saving = pulse.since
    time.sleep(0.002)
    pulse.enter("waiting for data")
    assert pulse.since > saving


def test_the_limit_follows_the_median_step(tmp_path):
    pulse = Pulse()
    watchdog = Watchdog(
        pulse,
        ResilienceSection(hang_factor=10, hang_min_s=5, hang_other_s=100),
        tmp_path,
        rank=0,
        world_size=1,
    )
    pulse.enter("training step")
    assert watchdog.limit_s() == 100  # the first steps
    for step, seconds in enumerate([9.0, 2.0, 2.0], start=1):
        pulse.finished_step(step, seconds)
    assert watchdog.limit_s() == 20
    pulse.enter("saving")
    assert watchdog.limit_s() == 100


def test_a_hang_leaves_stacks_a_reason_and_an_exit_code(tmp_path):
    (tmp_path / "logs").mkdir()
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    pulse = Pulse()
    settings = ResilienceSection(hang_other_s=0.5)
    with Watchdog(pulse, settings, tmp_path, rank=0, world_size=2, end=end):
        assert ended.wait(60)
    assert codes == [85]
    requeue = read_requeue(tmp_path)
    assert requeue is not None and requeue.cause is Cause.HANG
    reason = requeue.reason
    assert "hang in starting after step 0" in reason and "rank 1 left no sign of life" in reason
    stacks = (tmp_path / "logs" / "rank_00000.stacks.txt").read_text()
    assert "test_a_hang_leaves_stacks" in stacks


def test_a_run_that_goes_on_is_left_alone(tmp_path):
    pulse = Pulse()
    ended = []
    settings = ResilienceSection(hang_other_s=2)
    with Watchdog(pulse, settings, tmp_path, rank=0, world_size=1, end=ended.append):
        for step in range(1, 150):
            time.sleep(0.02)
            pulse.finished_step(step, 0.02)
    assert ended == [] and read_requeue(tmp_path) is None
