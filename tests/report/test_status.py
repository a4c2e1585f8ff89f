from __future__ import annotations

import errno
import json
import os
import pickle

import pytest

from meditron_train.errors import Cause, MeditronError, RequeueError, UserError, cause_of
from meditron_train.report.status import (
    Requeue,
    RunStatus,
    forget_failures,
    read_failures,
    read_requeue,
    read_status,
    record_failure,
    request_requeue,
)

FACTS = {"hosts": ["n1"], "world_size": 2}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def start(run_dir) -> RunStatus:
    status = RunStatus(run_dir, enabled=True)
    status.start(FACTS)
    return status


def test_a_whole_run(run_dir):
    with start(run_dir) as status:
        assert read_status(run_dir)["state"] == "starting"
        status.update(state="running", step=0)
        status.update(last_checkpoint="step_00000007")
        status.update(state="done", step=9)
    values = read_status(run_dir)
    assert (values["state"], values["step"], values["last_checkpoint"]) == ("done", 9, "step_00000007")
    assert [entry["why"] for entry in values["starts"]] == ["first start"]
    assert values["hosts"] == ["n1"]
    assert read_requeue(run_dir) is None
    assert sorted(os.listdir(run_dir)) == ["logs", "status.json"]


@pytest.mark.parametrize(
    ("error", "state", "requeue"),
    [
        (
            RequeueError("rank 1 differs", cause=Cause.REPLICAS_DIFFER),
            "stopped",
            Requeue(Cause.REPLICAS_DIFFER, "rank 1 differs"),
        ),
        (MeditronError("too many skipped steps", cause=Cause.BAD_STEPS), "failed", None),
        (RuntimeError("Connection closed by peer"), "crashed", None),
        (OSError(errno.ENOSPC, "x"), "failed", None),
    ],
)
def test_an_error_decides_the_state_and_leaves_its_cause(run_dir, error, state, requeue):
    with pytest.raises(type(error)), start(run_dir):
        raise error
    assert read_status(run_dir)["state"] == state
    assert read_status(run_dir)["cause"] == cause_of(error).value
    assert str(error) in read_status(run_dir)["reason"]
    assert read_requeue(run_dir) == requeue


def test_every_restart_has_its_reason(run_dir):
    with start(run_dir) as status:
        status.update(state="running", step=3)
        status.stopped("SIGUSR1", Cause.TIME_LIMIT)
    assert read_requeue(run_dir) == Requeue(Cause.TIME_LIMIT, "SIGUSR1")
    run_id = status.run_id
    with pytest.raises(UserError), start(run_dir) as status:
        assert read_requeue(run_dir) is None, "an old request must not requeue the next failure"
        raise UserError("the data has changed")
    assert read_status(run_dir)["exit_code"] == 2
    status = start(run_dir)
    status.update(state="running", step=5)  # and then kill -9
    assert start(run_dir).run_id == run_id
    assert [entry["why"] for entry in read_status(run_dir)["starts"]] == [
        "first start",
        "SIGUSR1",
        "failed: the data has changed",
        "ended without a word after step 5 (killed from outside, or its machine was lost)",
    ]


def test_steps_are_not_each_a_rename(run_dir):
    status = start(run_dir)
    status.update(state="running", step=0)
    before = os.stat(run_dir / "status.json").st_ino
    for step in range(1, 20):
        status.update(step=step)
    assert os.stat(run_dir / "status.json").st_ino == before
    status.update(last_checkpoint="step_00000019")
    assert read_status(run_dir)["step"] == 19


def test_other_ranks_write_nothing(run_dir):
    with RunStatus(run_dir, enabled=False) as status:
        status.start(FACTS)
        status.update(state="running")
        status.stopped("SIGTERM", Cause.TERMINATED)
    assert os.listdir(run_dir) == ["logs"]


def test_a_torn_status_is_none_and_is_replaced(run_dir):
    (run_dir / "status.json").write_text('{"state": "runn')
    assert read_status(run_dir) is None
    assert start(run_dir).run_id
    assert read_status(run_dir)["state"] == "starting"


def test_where_nothing_can_be_written_training_goes_on(run_dir, caplog):
    status = start(run_dir)
    os.rename(run_dir, run_dir.with_name("gone"))
    status.update(state="running")
    status.stopped("SIGTERM", Cause.TERMINATED)
    record_failure(run_dir, 0, ValueError("x"), None)
    assert "training goes on" in caplog.text


def test_failures_come_back_the_earliest_first(run_dir):
    record_failure(run_dir, 3, ConnectionError("closed by peer"), 5)
    record_failure(run_dir, 1, UserError("wrong"), None)
    text = (run_dir / "logs" / "rank_00003.failure.json").read_text()
    assert json.loads(text)["traceback"].startswith("ConnectionError")
    assert [failure["rank"] for failure in read_failures(run_dir)] == [3, 1]
    assert [failure["exit_code"] for failure in read_failures(run_dir)] == [1, 2]
    assert [failure["cause"] for failure in read_failures(run_dir)] == ["crashed", "user_error"]
    forget_failures(run_dir)
    assert read_failures(run_dir) == []


def test_a_request_to_requeue_is_one_line_of_data(run_dir):
    request_requeue(run_dir, "rank 3\non host n2", Cause.HANG)
    assert (run_dir / "requeue").read_text() == '{"cause": "hang", "reason": "rank 3\\non host n2"}\n'
    (run_dir / "requeue").write_text("a person wants it\n")
    assert read_requeue(run_dir) == Requeue(Cause.FAILED, "a person wants it")


def test_an_error_keeps_its_cause_on_the_way_to_other_ranks():
    error = pickle.loads(pickle.dumps(UserError("x is in use", cause=Cause.DIRECTORY_IN_USE)))
    assert (str(error), error.cause, error.exit_code) == ("x is in use", Cause.DIRECTORY_IN_USE, 2)


def test_on_a_full_disk_the_last_state_is_written_over_the_one_before(run_dir, monkeypatch):
    status = start(run_dir)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("meditron_train.report.status.replace_text", full)
    with pytest.raises(OSError, match="No space"), status:
        full()
    values = read_status(run_dir)
    assert (values["state"], values["cause"], values["exit_code"]) == ("failed", "disk", 1)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7" * 10_000])
def test_files_that_may_be_anybodys_are_read_with_bounds(tmp_path, text):
    (tmp_path / "logs").mkdir()
    for name in ("status.json", "requeue", "logs/rank_00000.failure.json"):
        (tmp_path / name).write_text(text)
    assert read_status(tmp_path) is None
    assert read_failures(tmp_path) == []
    assert read_requeue(tmp_path).cause == "failed"
