"""Faults of numbers and machines in whole runs: what is found, who is named, and what the run does then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meditron_train.errors import Cause, UserError
from meditron_train.report.status import Requeue, read_requeue, read_status
from meditron_train.train.guard.injected_faults import VARIABLE, Fault, parse
from meditron_train.train.guard.replicas import deviating_ranks
from tests.commands import Command
from tests.distributed import free_port, run_ranks
from tests.long import mostly_long
from tests.report.metrics_file import read_metrics
from tests.train.test_failures import message_rank
from tests.train.test_loop import losses, run, weights

SHORT = {"steps": 14, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"}


def faulty_rank(rank: int, world_size: int, config_file: Path, faults: str, overrides=()) -> tuple[int, str]:
    os.environ[VARIABLE] = faults
    try:
        return message_rank(rank, world_size, config_file, overrides)
    finally:
        del os.environ[VARIABLE]


def run_with(config: Path, faults: str, *overrides: str, world_size: int = 2) -> list[tuple[int, str]]:
    return run_ranks(faulty_rank, world_size, config, faults, overrides)


def test_the_faults_that_can_be_asked_for():
    assert parse("nan@7:rank=1, bitflip@9") == [Fault("nan", 7, 1), Fault("bitflip", 9, 0)]
    assert parse("") == []
    for wrong in ("nan", "typo@7", "nan@x", "nan@7:rank"):
        with pytest.raises(UserError, match=VARIABLE):
            parse(wrong)


@pytest.mark.long
def test_a_passing_fault_of_the_hardware_changes_nothing(write_config, tmp_path):
    config = write_config(train=SHORT)
    whole = run(config, world_size=2)
    config = write_config(train=SHORT, logging={"run_dir": str(tmp_path / "faulty")})
    assert run_with(config, "nan-once@5:rank=1") == [(0, "")] * 2
    assert losses(read_metrics(tmp_path / "faulty")) == losses(whole)
    last = "checkpoints/step_00000014"
    assert weights(tmp_path / "faulty" / last) == weights(tmp_path / "run" / last)
    assert "good the second time" in (tmp_path / "faulty" / "logs" / "rank_00000.log").read_text()


def test_a_spike_is_reported_by_default(write_config, tmp_path):
    assert run_with(write_config(train=SHORT), "spike@12") == [(0, "")] * 2
    assert "step 12 has a loss spike" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert read_metrics(tmp_path / "run")[-1]["num_skipped_steps"] == 0


@pytest.mark.long
def test_a_spike_is_skipped_where_that_is_wanted(write_config, tmp_path):
    config = write_config(train=SHORT, resilience={"anomaly_action": "skip"})
    assert run_with(config, "spike@12") == [(0, "")] * 2
    metrics = read_metrics(tmp_path / "run")
    assert [line["num_skipped_steps"] for line in metrics[-4:]] == [0, 1, 1, 1]
    norms = [line["param_norm"] for line in metrics]
    assert norms[10] == norms[11] != norms[12]


@pytest.mark.parametrize(
    "overrides",
    mostly_long([(), ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")], ()),
)
def test_a_spike_rolls_back_where_that_is_wanted(write_config, tmp_path, overrides):
    config = write_config(
        train=SHORT, resilience={"anomaly_action": "rollback"}, checkpoint={"interval": 9, "keep_last": 9}
    )
    assert run_with(config, "spike@12", *overrides) == [(0, "")] * 2
    metrics = read_metrics(tmp_path / "run")
    assert [line["num_skipped_steps"] for line in metrics[-4:]] == [0, 3, 3, 3]
    norms = [line["param_norm"] for line in metrics]
    assert norms[11] == norms[8] != norms[10], (
        "the weights after step 12 are those of the checkpoint of step 9"
    )
    assert norms[12] != norms[11]
    assert metrics[12]["tokens"] == 13 * 4 * 64


@pytest.mark.long
def test_too_many_rollbacks_to_one_checkpoint_stop_the_run(write_config):
    config = write_config(
        train=SHORT,
        resilience={"anomaly_action": "rollback", "max_rollbacks": 1},
        checkpoint={"interval": 9},
    )
    results = run_with(config, "spike@11,spike@13")
    assert [code for code, _ in results] == [1, 1]
    assert "step 13 would be rollback 2" in results[0][1] and "step_00000009" in results[0][1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "world_size", "named"),
    [
        ((), 3, ["rank 1"]),
        (("parallel.distributed_optimizer=false",), 3, ["rank 1"]),
        ((), 2, ["rank 0", "rank 1"]),
        (("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"), 3, ["rank 1"]),
        (("parallel.context=3", "train.seq_len=48"), 3, ["rank 1"]),
    ],
)
def test_a_flipped_bit_is_found_and_the_rank_named(write_config, tmp_path, overrides, world_size, named):
    config = write_config(
        train={**SHORT, "global_batch_size": 12},
        resilience={"replica_check_interval": 1},
        checkpoint={"interval": 4},
    )
    results = run_with(config, "bitflip@6:rank=1", *overrides, world_size=world_size)
    assert [code for code, _ in results] == [85] * world_size
    message = results[0][1]
    assert "in step 6" in message and "embedding.word_embeddings.weight" in message
    assert [f"rank {rank}" for rank in range(world_size) if f"rank {rank} on host" in message] == named
    assert read_requeue(tmp_path / "run") == Requeue(Cause.REPLICAS_DIFFER, message)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["last_checkpoint"]) == ("stopped", "step_00000004")
    assert [code for code, _ in run_with(config, "bitflip@6:rank=1", *overrides, world_size=world_size)] == [
        0
    ] * world_size, "a machine that is sound again finishes the run"


def test_a_flipped_bit_is_found_before_a_checkpoint_is_made_of_it(write_config, tmp_path):
    train = {**SHORT, "global_batch_size": 12}
    config = write_config(train=train, checkpoint={"interval": 4}, resilience={"on_replica_mismatch": "stop"})
    results = run_with(config, "bitflip@8:rank=2", world_size=3)
    assert [code for code, _ in results] == [1] * 3, "stop, not requeue"
    assert read_status(tmp_path / "run")["last_checkpoint"] == "step_00000004"
    assert read_requeue(tmp_path / "run") is None


def saving_between_log_lines_rank(rank: int, world_size: int, config_file: Path, overrides: tuple) -> list:
    """Steps 1 and 2 are saved on the node, 3 because of RUN_DIR/stop; none of them has a log line."""
    from meditron_train.train.loop import Run
    from meditron_train.train.saving.local_checkpoints import LocalCheckpoints

    count, save, saved_locally = Run.count, LocalCheckpoints.save, []

    def count_and_ask(self, step, result):
        count(self, step, result)
        if step == 3 and rank == 0:
            (self.run_dir.path / "stop").touch()

    def save_and_note(self, engine, progress):
        save(self, engine, progress)
        saved_locally.append(progress.step)

    Run.count, LocalCheckpoints.save = count_and_ask, save_and_note  # a process of its own
    return [*message_rank(rank, world_size, config_file, overrides), saved_locally]


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides", [(), ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")]
)
def test_a_save_between_log_lines_accuses_no_host(write_config, tmp_path, overrides):
    """With overlap_param_gather nothing has made the parameters whole since the update."""
    config = write_config(
        train=SHORT,
        checkpoint={"interval": 100, "local_interval": 1, "local_dir": str(tmp_path / "local")},
        validation={"interval": 100},
        logging={"run_dir": str(tmp_path / "run"), "wandb": "disabled", "tensorboard": False, "interval": 5},
    )
    results = run_ranks(saving_between_log_lines_rank, 2, config, overrides)
    assert results == [[85, "", [1, 2, 3]]] * 2
    requeue = read_requeue(tmp_path / "run")
    assert requeue is not None and requeue.cause is Cause.STOP_FILE
    assert read_status(tmp_path / "run")["last_checkpoint"] == "step_00000003"
    assert run(config, *overrides, world_size=2)[-1]["step"] == 14


def lost_peer_rank(rank: int, world_size: int, config_file: Path, run_dir: Path) -> tuple[int, str]:
    """One rank whose training ends with an error after another rank has asked to be started again."""
    from meditron_train.report.status import request_requeue
    from meditron_train.train.loop import Run

    def loop(self) -> int:
        request_requeue(run_dir, "rank 1 on host a is busy", Cause.HANG)
        raise RuntimeError("Connection closed by peer")

    Run.loop = loop  # a process of its own
    return message_rank(rank, world_size, config_file)


def test_an_error_after_a_hang_was_named_is_its_consequence(write_config, tmp_path):
    [(exit_code, message)] = run_ranks(lost_peer_rank, 1, write_config(train=SHORT), tmp_path / "run")
    assert exit_code == 85 and "rank 1 on host a is busy" in message
    assert read_status(tmp_path / "run")["state"] == "stopped"


def test_copies_are_compared_by_majority():
    a, b = ("norm", -1), ("matrix", 0)
    assert deviating_ranks([{a: 1, b: 2}, {a: 1, b: 2}]) == {}
    assert deviating_ranks([{a: 1}, {a: 1}, {a: 9}, {b: 3}]) == {2: ["norm"]}
    assert deviating_ranks([{a: 1}, {a: 9}]) == {0: ["norm"], 1: ["norm"]}


def start_ranks(config: Path, faults: str, *overrides: str, world_size: int = 2) -> list[Command]:
    """Ranks as separate commands, for faults that end the process in their own way."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    place |= {"LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", VARIABLE: faults}
    return [
        Command(
            "train",
            config,
            *overrides,
            environment={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_the_run_ends_to_be_requeued(write_config, tmp_path):
    config = write_config(train=SHORT, checkpoint={"interval": 4}, resilience={"hang_min_s": 12})
    ranks = start_ranks(config, "hang@6:rank=1")
    said = [process.communicate(timeout=170)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [85, 85], said
    requeue = read_requeue(tmp_path / "run")
    assert requeue is not None and requeue.cause is Cause.HANG
    reason = requeue.reason
    assert "hang in training step after step 5" in reason
    assert "rank 1 on host" in reason and "is busy" in reason and "injected_faults.py" in reason
    assert "rank 0" not in reason
    for rank in range(2):
        assert "Thread" in (tmp_path / "run" / "logs" / f"rank_{rank:05d}.stacks.txt").read_text()
    ranks = start_ranks(config, "", "resilience.hang_factor=0")
    assert [process.wait(170) for process in ranks] == [0, 0]
    assert "hang" in read_status(tmp_path / "run")["starts"][1]["why"]
