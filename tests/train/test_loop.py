"""Whole runs: metrics, validation, checkpoints, resuming, stopping, and what a bad step does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from meditron_train.errors import Cause
from meditron_train.flows.job_end import Action, Decision, decide
from meditron_train.report.status import Requeue, read_requeue, read_status
from meditron_train.train.guard.injected_faults import VARIABLE
from tests.commands import Command
from tests.distributed import run_ranks


def run_rank(rank: int, world_size: int, config_file: Path, overrides: tuple[str, ...] = ()) -> int:
    from meditron_train.config.load import load_config
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.train.life.stop_signals import StopSignals
    from meditron_train.train.start import train

    config, launch = load_config(config_file, list(overrides)), detect_launcher()
    with StopSignals(config.logging.run_dir, checks_files=rank == 0) as signals:
        return train(config, launch, signals)


def run(config_file: Path, *overrides: str, world_size: int = 1) -> list[dict]:
    """Run to the end on `world_size` ranks; the metrics lines."""
    from meditron_train.config.load import load_config
    from tests.report.metrics_file import read_metrics

    assert run_ranks(run_rank, world_size, config_file, overrides) == [0] * world_size
    return read_metrics(load_config(config_file, list(overrides)).logging.run_dir)


def losses(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics]


def test_a_run_learns_and_records(write_config, tmp_path):
    config = write_config(checkpoint={"interval": 8, "export_hf": True, "keep_last": 1})
    metrics = run(config)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[-1]["tokens"] == 20 * 4 * 64
    for key in ("lr", "grad_norm", "param_norm", "tokens_per_second", "step_time_s", "peak_memory_bytes"):
        assert metrics[-1][key] > 0, key
    assert metrics[-1]["mfu"] is None  # a CPU has no published peak
    assert metrics[9]["validation_loss.held-out"] > metrics[19]["validation_loss.held-out"] > 0
    assert "validation_loss.held-out" not in metrics[10]
    run_dir = tmp_path / "run"
    assert sorted(entry.name for entry in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000020"]
    assert (run_dir / "provenance.jsonl").exists() and (run_dir / "logs" / "rank_00000.log").exists()


def test_the_exported_model_computes_what_the_run_validated(write_config, tmp_path, corpus):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from meditron_train.config.load import load_config
    from meditron_train.data.packed import build_validation_datasets
    from tests.train.reference import loss_sum_alone

    config = write_config(checkpoint={"export_hf": True}, train={"steps": 4, "seq_len": 64, "global_batch_size": 4,
                          "precision": "fp32", "device": "cpu"})  # fmt: skip
    metrics = run(config, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", dtype="float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "hf").encode("the dose")[0] == 1
    dataset = build_validation_datasets(load_config(config).data, 64, None)["held-out"]
    batches = [dataset.microbatch([i]) for i in range(2 * 4)]  # validation.steps batches
    with torch.no_grad():
        total = float(sum(loss_sum_alone(model, batch) for batch in batches))
    expected = total / float(sum(batch.loss_mask_T.sum() for batch in batches))
    assert metrics[-1]["validation_loss.held-out"] == pytest.approx(expected, rel=1e-5)


def test_kill_9_then_resume_is_bit_identical(write_config, tmp_path):
    whole = run(write_config("whole.yaml", logging={"run_dir": str(tmp_path / "whole"), "wandb": "disabled",
                "tensorboard": False}))  # fmt: skip
    config = write_config(checkpoint={"interval": 7, "export_hf": False})
    kill_when(config, tmp_path / "run", step=9)
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert [line["grad_norm"] for line in resumed] == [line["grad_norm"] for line in whole]
    assert [line["param_norm"] for line in resumed] == [line["param_norm"] for line in whole]
    last = "checkpoints/step_00000020"
    assert weights(tmp_path / "run" / last) == weights(tmp_path / "whole" / last)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_resume_under_another_layout(write_config, tmp_path, precision):
    train = {"steps": 8, "seq_len": 64, "global_batch_size": 4, "precision": precision, "device": "cpu"}
    whole = run(write_config("whole.yaml", train=train, logging={"run_dir": str(tmp_path / "whole"),
                "wandb": "disabled", "tensorboard": False}), "parallel.tensor=2", world_size=2)  # fmt: skip
    config = write_config(train=train)
    stop_file_after(config, tmp_path / "run", step=3, overrides=("parallel.tensor=2",), world_size=2)
    resumed = run(config, "parallel.pipeline=2", world_size=4)  # tp1, pp2, dp2
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert losses(resumed) == pytest.approx(losses(whole), rel=tolerance)
    assert losses(resumed)[:3] == losses(whole)[:3]
    last = "checkpoints/step_00000008"
    expected = tensors(tmp_path / "whole" / last)
    for name, tensor in tensors(tmp_path / "run" / last).items():
        difference = (tensor - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"
    # The same samples in the same order: what the loss was computed on is listed for each step.
    from meditron_train.data.trace import trace_step

    for step in (1, 3, 4, 8):
        one, other = (trace_step(tmp_path / name, step) for name in ("run", "whole"))
        assert one["segments"] == other["segments"] and one["segments"]


def stop_file_after(config: Path, run_dir: Path, *, step: int, overrides=(), world_size: int) -> None:
    """Run with a request to stop that is there from the start of step `step` on, by way of a checkpoint there."""
    codes = run_ranks(stop_rank, world_size, config, overrides, run_dir, step)
    assert codes == [85] * world_size
    assert not (run_dir / "stop").exists(), "an obeyed request must not stop the next start"


def stop_rank(rank: int, world_size: int, config_file: Path, overrides, run_dir: Path, step: int) -> int:
    from meditron_train.train import loop

    count = loop.Run.count

    def count_and_ask(self, number, result):
        count(self, number, result)
        if number == step and rank == 0:
            (run_dir / "stop").touch()

    loop.Run.count = count_and_ask
    return run_rank(rank, world_size, config_file, overrides)


def tensors(checkpoint: Path) -> dict:
    from meditron_train.checkpoint.sharded.read import ShardedSource

    source = ShardedSource(checkpoint)
    return {name: source.read(name).float() for name in source.names}


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors(checkpoint).items()}


def start(config: Path, *overrides: str) -> Command:
    return Command("train", config, *overrides, environment={**os.environ, "OMP_NUM_THREADS": "1"})


def signal_when(config: Path, run_dir: Path, *, step: int, number: int) -> Command:
    """Start a run and send a signal once its metrics show `step`."""
    from tests.report.metrics_file import read_metrics

    def is_done() -> bool:
        lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        return bool(lines) and lines[-1]["step"] >= step

    process = start(config)
    process.wait_until(is_done, 120)
    os.killpg(process.pid, number)
    return process


def kill_when(config: Path, run_dir: Path, *, step: int, number: int = signal.SIGKILL) -> Command:
    """Start a run, send a signal once its metrics show `step`, and wait for its end."""
    process = signal_when(config, run_dir, step=step, number=number)
    process.wait(60)
    return process


@pytest.mark.parametrize(
    "number, cause, name",
    [
        (signal.SIGTERM, Cause.TERMINATED, "SIGTERM"),
        (signal.SIGUSR1, Cause.TIME_LIMIT, "SIGUSR1"),
        (signal.SIGINT, Cause.INTERRUPTED, "Ctrl-C"),
    ],
)
def test_a_signal_saves_and_exits_85(write_config, tmp_path, number, cause, name):
    config = write_config(
        checkpoint={"interval": 1000, "export_hf": False},
        train={"steps": 2000, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
    )
    process = kill_when(config, tmp_path / "run", step=3, number=number)
    assert process.returncode == 85
    assert read_requeue(tmp_path / "run") == Requeue(cause, name)
    assert read_status(tmp_path / "run")["state"] == "stopped"
    (saved,) = [entry.name for entry in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert int(saved.removeprefix("step_")) >= 3
    assert name in process.stderr


def test_a_second_ctrl_c_ends_a_run_that_cannot_finish_its_step(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "hang@4")
    process = start(write_config())
    # Once it hangs: a request that comes before makes it save after step 3.
    process.wait_until((tmp_path / "run" / "injected" / "hang@4.rank0").exists, 120)
    os.killpg(process.pid, signal.SIGINT)
    process.wait_until(lambda: "press it again" in process.stderr, 30)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) == []


def lone_rank(rank: int, world_size: int, config_file: Path) -> tuple[int, str] | None:
    """Rank 0 of two; the other does not come."""
    from tests.train.test_failures import message_rank

    return message_rank(rank, world_size, config_file) if rank == 0 else None


def test_a_stop_file_that_is_seen_while_ranks_meet_ends_the_job(write_config, tmp_path):
    """It was tried three times: nothing told the batch script why, and the file was still there."""
    run_dir, log_dir = tmp_path / "run", tmp_path / "logs"
    for directory in (run_dir, log_dir):
        directory.mkdir()
    (log_dir / "started").touch()
    (run_dir / "stop").touch()
    (ended, _) = run_ranks(lone_rank, 2, write_config())
    assert ended is not None and ended[0] == 85 and f"stopped by the file {run_dir / 'stop'}" in ended[1]
    assert decide(log_dir, run_dir) == Decision(Action.END, 0, ended[1])
    assert not (run_dir / "stop").exists() and read_status(run_dir) is None


def terminated_rank(rank: int, world_size: int, config_file: Path) -> tuple[int, str] | None:
    from meditron_train.train.life.stop_signals import StopSignals

    enter = StopSignals.__enter__

    def enter_and_hear(self):
        enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    StopSignals.__enter__ = enter_and_hear  # a process of its own
    return lone_rank(rank, world_size, config_file)


def test_the_sigterm_that_torchrun_sends_while_ranks_meet_asks_for_nothing(write_config, tmp_path):
    """As another rank has failed: the start counts as one that has, and is not repeated for ever."""
    (tmp_path / "run").mkdir()
    (ended, _) = run_ranks(terminated_rank, 2, write_config())
    assert ended is not None and ended[0] == 85 and "stopped by SIGTERM" in ended[1]
    assert read_requeue(tmp_path / "run") is None


def test_a_stop_file_is_for_the_run_that_has_the_directory(write_config, tmp_path):
    from meditron_train.train.life.run_dir import RunDir

    with RunDir(tmp_path / "run").locked():
        (tmp_path / "run" / "stop").touch()
        (ended, _) = run_ranks(lone_rank, 2, write_config())
    assert ended is not None and ended[0] == 85
    assert (tmp_path / "run" / "stop").exists() and read_requeue(tmp_path / "run") is None
