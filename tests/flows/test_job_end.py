"""What follows from the files that the ranks of a start leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meditron_train.errors import Cause, MeditronError, UserError
from meditron_train.flows.job_end import Action, Decision, decide
from meditron_train.report.status import failure_path, record_failure, request_requeue

MISTAKE = UserError("there is no file /data/one.bin")


@pytest.fixture
def start(tmp_path) -> tuple[Path, Path]:
    """(LOG_DIR, RUN_DIR) of a start that began a minute ago."""
    log_dir, run_dir = tmp_path / "job", tmp_path / "run"
    log_dir.mkdir()
    (run_dir / "logs").mkdir(parents=True)
    (log_dir / "started").touch()
    a_minute_ago = (log_dir / "started").stat().st_mtime - 60
    os.utime(log_dir / "started", (a_minute_ago, a_minute_ago))
    return log_dir, run_dir


def test_a_start_that_left_nothing_is_tried_again(start):
    assert decide(*start) == Decision(Action.RETRY, 1, "")


def test_a_mistake_that_rank_5_alone_sees_is_not_tried_again(start):
    """The others lost its connection, and said so before and after; one even took it for a hang."""
    _, run_dir = start
    record_failure(run_dir, 0, RuntimeError("Connection closed by peer"), 3)
    record_failure(run_dir, 5, MISTAKE, 3)
    record_failure(run_dir, 6, MeditronError("another rank has gone"), 3)
    request_requeue(run_dir, "rank 5 is gone", Cause.HANG)
    (run_dir / "status.json").write_text('{"state": "failed", "exit_code": 1, "reason": "Connection closed"}')
    decision = decide(*start)
    assert (decision.action, decision.exit_code) == (Action.GIVE_UP, 2)
    assert "rank 5 on host" in decision.why and str(MISTAKE) in decision.why


def test_the_mistake_of_an_earlier_start_does_not_count(start):
    log_dir, run_dir = start
    record_failure(run_dir, 5, MISTAKE, 3)
    earlier = (log_dir / "started").stat().st_mtime - 1
    os.utime(failure_path(run_dir, 5), (earlier, earlier))
    record_failure(run_dir, 0, RuntimeError("Connection closed by peer"), 3)
    assert decide(*start).action is Action.RETRY


def test_a_directory_that_is_in_use_may_be_free_the_next_time(start):
    record_failure(start[1], 5, UserError("in use", cause=Cause.DIRECTORY_IN_USE), None)
    assert decide(*start).action is Action.RETRY


def test_what_a_person_asked_for_comes_first(start):
    record_failure(start[1], 5, MISTAKE, 3)
    request_requeue(start[1], "the file RUN_DIR/stop", Cause.STOP_FILE)
    assert decide(*start) == Decision(Action.END, 0, "the file RUN_DIR/stop")
