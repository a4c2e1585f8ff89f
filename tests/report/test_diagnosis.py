"""Each way in which a run ends, as its files tell it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from meditron_train.errors import Cause, MeditronError, RequeueError, SaveError, UserError
from meditron_train.report.diagnosis import diagnose
from meditron_train.report.status import RunStatus, record_failure, request_requeue

PEER = RuntimeError(
    "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.3]:4242"
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def end(run_dir: Path, error: BaseException | None, *, rank: int = 0) -> RunStatus:
    """A run of 3 ranks that comes to step 7, where `error` ends it (None: it goes on, or is killed)."""
    status = RunStatus(run_dir, enabled=True)
    try:
        with status:
            status.start({"hosts": ["n1"], "world_size": 3, "steps": 20})
            status.update(state="running", step=7, last_checkpoint="step_00000005")
            if error is not None:
                raise error
    except BaseException:
        record_failure(run_dir, rank, error, 7)
    return status


def test_finished(run_dir):
    end(run_dir, None).update(state="done", step=20)
    found = diagnose(run_dir)
    assert found.cause == "finished" and "all 20 steps are done" in found.summary and not found.will_requeue


def test_the_time_limit(run_dir):
    end(run_dir, None).stopped("x", Cause.TIME_LIMIT)
    found = diagnose(run_dir)
    assert found.cause == "time_limit" and found.will_requeue and "after step 7 of 20" in found.summary


@pytest.mark.parametrize("cause", [Cause.TIME_LIMIT, Cause.TERMINATED, Cause.STOP_FILE, Cause.INTERRUPTED])
def test_asked_to_stop(run_dir, cause):
    end(run_dir, None).stopped("in any words", cause)
    found = diagnose(run_dir)
    assert found.cause == cause.value and found.will_requeue and "in any words" in found.evidence[0]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RequeueError("rank 1 on host n2 (norm)", cause=Cause.REPLICAS_DIFFER), "bit_flip"),
        (MeditronError("3 in a row", cause=Cause.BAD_STEPS), "nan"),
        (SaveError("the checkpoint of step 8 could not be written", cause=Cause.DISK), "disk"),
        (OSError(30, "Read-only file system", "x"), "disk"),
        (UserError("other data than in step_00000005", cause=Cause.CHANGED), "data_changed"),
        (UserError("parallel.tensor 3 does not divide 4 heads"), "user_error"),
        (MeditronError("a training step is too large", cause=Cause.OUT_OF_MEMORY), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (ValueError("a bug"), "crashed"),
    ],
)
def test_what_ranks_say(run_dir, error, cause):
    end(run_dir, error)
    found = diagnose(run_dir)
    assert found.cause == cause
    assert str(error)[:20] in found.summary + "".join(found.evidence)
    assert found.advice
    assert found.will_requeue == isinstance(error, RequeueError)


FOREIGN = (
    "there is no directory /data/killed/by-nccl: out of memory, timed out, no space left, NODE FAIL, gloo"
)


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause is not Cause.CRASHED])
def test_a_cause_of_ours_outranks_the_words_beside_it(run_dir, cause):
    """In status.json, in a rank's failure while the others know nothing, in requeue, and in the logs."""
    status = RunStatus(run_dir, enabled=True)
    status.start({"hosts": ["n1"], "world_size": 3, "steps": 20})
    record_failure(run_dir, 1, MeditronError(FOREIGN, cause=cause), 7)
    record_failure(run_dir, 2, PEER, 7)
    (run_dir / "logs" / "n1-0.log").write_text(f"error: {FOREIGN}\n")
    assert diagnose(run_dir).cause == cause.value  # the ranks' word, as status.json has none
    status.update(state="failed", cause=cause, reason=FOREIGN)
    found = diagnose(run_dir)
    assert found.cause == cause.value and FOREIGN in found.summary + found.evidence[0]
    request_requeue(run_dir, FOREIGN, cause)
    assert diagnose(run_dir).cause == cause.value


def test_the_words_beside_a_cause_of_a_later_version_are_not_searched(run_dir):
    status = RunStatus(run_dir, enabled=True)
    status.start({"hosts": ["n1"], "world_size": 3, "steps": 20})
    status.update(state="failed", cause="of_a_later_version", reason=FOREIGN)
    found = diagnose(run_dir)
    assert found.cause == "failed" and FOREIGN in found.summary


def test_a_hang_is_told_by_the_watchdog_though_rank_0_never_could(run_dir):
    end(run_dir, None)
    request_requeue(run_dir, "...; rank 2 on host n3 is busy", Cause.HANG)
    found = diagnose(run_dir)
    assert found.cause == "hang" and found.will_requeue and "rank 2 on host n3" in found.evidence[0]


def test_the_rank_that_failed_by_itself_counts_more_than_those_that_lost_it(run_dir):
    end(run_dir, PEER)
    record_failure(run_dir, 2, RuntimeError("CUDA out of memory"), 7)
    found = diagnose(run_dir)
    assert found.cause == "out_of_memory" and "rank 2" in found.evidence[0]


def test_a_rank_that_was_killed_is_the_one_that_said_nothing(run_dir):
    end(run_dir, PEER)
    record_failure(run_dir, 2, PEER, 7)
    (run_dir / "heartbeats").mkdir()
    (run_dir / "heartbeats" / "rank_00001.json").write_text(json.dumps({"rank": 1, "host": "n2"}))
    found = diagnose(run_dir)
    assert found.cause == "killed" and "rank 1 on host n2 ended without a word" in found.summary


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "out_of_memory"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***", "time_limit"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO PREEMPTION ***", "terminated"),
        ("srun: error: Node failure on n2: NODE FAIL", "killed"),
    ],
)
def test_what_a_batch_system_wrote_into_the_logs(run_dir, line, cause):
    end(run_dir, None)
    (run_dir / "logs" / "7").mkdir()
    (run_dir / "logs" / "7" / "n1-0.log").write_text(f"step 7/20\n{line}\nmore\n")
    found = diagnose(run_dir)
    assert found.cause == cause and found.evidence == (f"logs/7/n1-0.log: {line}",)


def test_no_word_at_all(run_dir):
    end(run_dir, None)
    assert diagnose(run_dir).cause == "running_or_killed"


def test_no_run(run_dir):
    assert diagnose(run_dir).cause == "unknown"


FULL = "status.json could not be written, training goes on: [Errno 28] No space left on device"


def test_our_own_logs_are_not_searched(run_dir):
    end(run_dir, None)
    (run_dir / "logs" / "rank_00000.log").write_text(
        f"2026-01-01 10:00:00,123 WARNING meditron_train.x: {FULL}\n"
    )
    (run_dir / "logs" / "wandb.log").write_text("wandb: ERROR out of memory\n")
    (run_dir / "logs" / "n1-0.log").write_text(f"10:00:00 WARNING {FULL}\n10:00:01 [rank 3] ERROR {FULL}\n")
    said = f"[2026-01-01 10:00:00] job 7: the ranks ended with exit code 1 ({FULL})\n"
    (run_dir / "logs" / "train-7.out").write_text(said)
    assert diagnose(run_dir).cause == "running_or_killed"


def test_what_an_earlier_start_left_is_not_searched(run_dir):
    line = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0\n"
    old = run_dir / "logs" / "train-6.out"
    old.write_text(line)
    os.utime(old, (time.time() - 3600,) * 2)
    marks = ("\n==== 2026-01-01 10:00:00 rank 0 of 3, rendezvous 7.0.1 ====\n",
             "[2026-01-01 10:00:00] job 7: training on n1; follow it with: tail -f logs/7/n1-0.log\n")  # fmt: skip
    end(run_dir, None)
    for number, mark in enumerate(marks):
        (run_dir / "logs" / f"n{number}.log").write_text(f"{line}{mark}10:00:00 INFO step 8\n")
    assert diagnose(run_dir).cause == "running_or_killed"
    (run_dir / "logs" / "n0.log").write_text(f"step\n{marks[0]}10:00:00 INFO step 8\n{line}")
    assert diagnose(run_dir).cause == "out_of_memory"


def test_the_logs_of_the_batch_job_are_found(run_dir, tmp_path_factory):
    logs, output = tmp_path_factory.mktemp("7"), tmp_path_factory.mktemp("submit") / "train-7.out"
    status = RunStatus(run_dir, enabled=True)
    status.start({"hosts": ["n1"], "world_size": 3, "steps": 20, "log_dir": str(logs)})
    line = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T10:00:00 DUE TO TIME LIMIT ***"
    output.write_text(f"[2026-01-01 10:00:00] job 7: training on n1\n{line}\n")
    assert diagnose(run_dir).cause == "running_or_killed"
    (logs / "job.out").symlink_to(output)
    (logs / "job.err").symlink_to(output)
    (logs / "n1-0.out").symlink_to(logs / "nowhere")
    found = diagnose(run_dir)
    assert found.cause == "time_limit" and found.evidence[0].endswith(f"{line}")


@pytest.mark.parametrize("log_dir", ["/nowhere", "a\0b", "", 7, ["x"]])
def test_a_directory_of_logs_may_be_anything(run_dir, log_dir):
    RunStatus(run_dir, enabled=True).start({"steps": 20, "log_dir": log_dir})
    assert diagnose(run_dir).cause == "running_or_killed"


def test_an_end_before_the_first_step(run_dir):
    for summary in ("It was before the first step.", "It was before the first step of this start."):
        with pytest.raises(MeditronError), RunStatus(run_dir, enabled=True) as status:
            status.start({"steps": 20})
            raise MeditronError("too large", cause=Cause.OUT_OF_MEMORY)
        assert diagnose(run_dir).summary.endswith(summary)
