"""What a user can get wrong and what a machine can do to a run: one clear message, and the last good checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.test_loop import run, run_rank


def message_rank(rank: int, world_size: int, config_file: Path, overrides=()) -> tuple[int, str]:
    """Run one rank; (exit code, message) of its MeditronError."""
    from meditron_train.errors import MeditronError

    try:
        return run_rank(rank, world_size, config_file, overrides), ""
    except MeditronError as error:
        return error.exit_code, str(error)


def failure(config_file: Path, *overrides: str, world_size: int = 1, code: int = 2) -> str:
    """Run and expect every rank to end with `code` and the same message."""
    results = run_ranks(message_rank, world_size, config_file, overrides)
    assert [exit_code for exit_code, _ in results] == [code] * world_size, results
    assert len({message for _, message in results}) == 1
    return results[0][1]


@pytest.fixture
def broken_model(hf_dir, tmp_path):
    return Path(shutil.copytree(hf_dir, tmp_path / "broken"))


def test_every_mistake_in_one_message_before_any_rank_connects(write_config):
    message = failure(
        write_config(train={"steps": 10, "seq_len": 63, "global_batch_size": 7, "precision": "fp32"}),
        "parallel.tensor=3",
        "parallel.pipeline=3",
        "parallel.virtual_pipeline=2",
        "parallel.context=2",
        "optimizer.min_lr=1",
        "data.tokenizer=/nowhere",
    )
    for part in (
        "world size 1 is not divisible",
        "2 layers are not divisible",
        "heads",
        "min_lr",
        "/nowhere",
    ):
        assert part in message


def test_a_missing_model_comes_with_every_other_mistake(write_config):
    message = failure(
        write_config(model={"from": "/nowhere/model"}, data={"tokenizer": "/nowhere/tokenizer"})
    )
    assert "/nowhere/model" in message and "/nowhere/tokenizer" in message


def test_a_truncated_shard(write_config, broken_model):
    shard = broken_model / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    message = failure(write_config(model={"from": str(broken_model)}))
    assert str(shard) in message


def test_a_missing_shard(write_config, broken_model):
    (broken_model / "model.safetensors").unlink()
    assert str(broken_model) in failure(write_config(model={"from": str(broken_model)}))


def test_another_architecture(write_config, broken_model):
    config = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel" in failure(write_config(model={"from": str(broken_model)}))


def test_a_tokenizer_larger_than_the_embedding(write_config, tmp_path):
    from tests.train.reference import hf_model

    hf_model(vocab_size=200).save_pretrained(tmp_path / "small")
    message = failure(write_config(model={"from": str(tmp_path / "small")}))
    assert "has 300 tokens but the model's embedding has 200" in message


def test_an_empty_dataset(write_config, tmp_path, hf_dir):
    from tests.train.conftest import write_corpus

    write_corpus(tmp_path / "empty", 300, num_documents=0, seed=0)
    data = {"train": [{"name": "none", "path": str(tmp_path / "empty")}], "validation": []}
    assert "empty" in failure(write_config(data=data))


def test_an_index_of_other_data(write_config, corpus, tmp_path):
    shutil.copy(corpus / "one.idx", tmp_path / "mixed.idx")
    shutil.copy(corpus / "two.bin", tmp_path / "mixed.bin")
    data = {"train": [{"name": "mixed", "path": str(tmp_path / "mixed")}], "validation": []}
    message = failure(write_config(data=data))
    assert "mixed.idx" in message and "mixed.bin" in message


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_sequence_longer_than_all_data(write_config, tmp_path, packing):
    from tests.train.conftest import write_corpus

    write_corpus(tmp_path / "short", 300, num_documents=2, seed=0)
    data = {
        "train": [{"name": "short", "path": str(tmp_path / "short")}],
        "validation": [],
        "packing": packing,
    }
    message = failure(write_config(data=data), "train.seq_len=512")
    assert "train.seq_len = 512" in message and "108" in message


def test_a_run_directory_in_use(write_config, tmp_path):
    from meditron_train.train.life.run_dir import RunDir

    with RunDir(tmp_path / "run").locked():
        message = failure(write_config())
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()}" in message


@pytest.mark.long
def test_a_checkpoint_cut_off_while_it_was_written_is_removed(write_config, tmp_path):
    short = {"steps": 2, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"}
    config = write_config(train=short, schedule={"warmup_steps": 0})
    run(config)
    unfinished = tmp_path / "run" / "checkpoints" / "step_00000004.tmp"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half a file")
    metrics = run(config, "train.steps=3")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert not unfinished.exists()


def test_the_newest_intact_checkpoint_is_taken(write_config, tmp_path):
    config = write_config(
        checkpoint={"interval": 2, "export_hf": False},
        train={"steps": 6, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"},
    )
    whole = run(config)
    damaged = next((tmp_path / "run" / "checkpoints" / "step_00000006").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = run(config)
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    said = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert (
        "step_00000006" in said
        and "not intact" in said
        and "resuming from" in said
        and "after step 4" in said
    )


def test_another_model_in_the_same_directory_is_refused(write_config):
    short = {"steps": 2, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"}
    run(write_config(train=short, schedule={"warmup_steps": 0}))
    message = failure(write_config(train={**short, "seed": 4321}, schedule={"warmup_steps": 0}))
    assert "train.seed: 1234 -> 4321" in message


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB; three checkpoints of the test's model do not fit."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7500k", "tmpfs", str(mount_point)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


@pytest.mark.parametrize("asynchronous", mostly_long(["false", "true"], "false"))
def test_a_full_disk_keeps_the_last_good_checkpoint(write_config, small_disk, asynchronous):
    config = write_config(
        checkpoint={"interval": 2, "keep_last": 9, "export_hf": False},
        train={"steps": 20, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"},
        logging={"run_dir": str(small_disk / "run"), "wandb": "disabled", "tensorboard": False},
    )
    message = failure(config, f"checkpoint.async_save={asynchronous}", world_size=2, code=1)
    checkpoints = small_disk / "run" / "checkpoints"
    finished = sorted(entry.name for entry in checkpoints.glob("step_*"))
    assert finished and all(not name.endswith(".tmp") for name in finished)
    assert f"the last good checkpoint is {checkpoints / finished[-1]}" in message
    from meditron_train.checkpoint.sharded.store import verify_manifest

    assert verify_manifest(checkpoints / finished[-1]) == []


@pytest.mark.long
def test_the_last_checkpoint_takes_the_room_of_an_old_one(write_config, small_disk):
    config = write_config(
        checkpoint={"interval": 2, "keep_last": 9, "export_hf": False},
        train={"steps": 12, "seq_len": 64, "global_batch_size": 8, "precision": "fp32"},
        schedule={"warmup_steps": 1},
        resilience={"max_failed_saves": 9},
        logging={"run_dir": str(small_disk / "run"), "wandb": "disabled", "tensorboard": False},
    )
    assert [code for code, _ in run_ranks(message_rank, 1, config)] == [0]
    finished = sorted(entry.name for entry in (small_disk / "run" / "checkpoints").glob("step_*"))
    assert finished[0] != "step_00000002" and finished[-2:] == ["step_00000006", "step_00000012"]


def test_a_start_on_a_full_disk_is_one_message_and_the_state_failed(write_config, small_disk):
    run_dir = small_disk / "run"
    config = write_config(
        train={"steps": 2, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"},
        schedule={"warmup_steps": 1},
        checkpoint={"export_hf": False},
        logging={"run_dir": str(run_dir), "wandb": "disabled", "tensorboard": False},
    )
    assert [code for code, _ in run_ranks(message_rank, 1, config)] == [0]
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    [(code, message)] = run_ranks(message_rank, 1, config, ("train.steps=4",))
    assert code == 1 and "No space left" in message
    from meditron_train.report.status import read_status

    status = read_status(run_dir)
    assert status is not None and status["state"] in (
        "failed",
        "done",
    )  # "done": not even the start was noted


def poisoned_rank(rank: int, world_size: int, config_file: Path, steps: dict[int, str]) -> tuple[int, str]:
    """Run with the losses of the given steps multiplied by NaN or infinity, on the last rank only."""
    from meditron_train.train.engine import Engine

    compute_gradients = Engine.compute_gradients
    calls = iter(range(1, 1000))

    def poisoned(self, batches, step):
        value = steps.get(next(calls))
        if value is None or rank != world_size - 1:
            return compute_gradients(self, batches, step)
        hook = self.chunks[-1].register_forward_hook(lambda _, __, output: output * float(value))
        try:
            return compute_gradients(self, batches, step)
        finally:
            hook.remove()

    Engine.compute_gradients = poisoned
    return message_rank(rank, world_size, config_file)


@pytest.mark.parametrize("value", mostly_long(["nan", "inf"], "nan"))
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(write_config, tmp_path, value):
    from tests.report.metrics_file import read_metrics

    config = write_config(
        train={"steps": 6, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"},
        validation={"interval": 1},
        resilience={"retry_bad_steps": False},
    )
    assert run_ranks(poisoned_rank, 2, config, {3: value}) == [(0, "")] * 2
    metrics = read_metrics(tmp_path / "run")
    assert [line["num_skipped_steps"] for line in metrics] == [0, 0, 1, 1, 1, 1]
    norms = [line["param_norm"] for line in metrics]
    assert norms[1] == norms[2] != norms[3]
    assert metrics[1]["validation_loss.held-out"] == metrics[2]["validation_loss.held-out"]
    assert metrics[5]["loss"] < metrics[0]["loss"]


def test_too_many_in_a_row_stop_the_run_with_the_last_good_checkpoint(write_config, tmp_path):
    config = write_config(
        train={"steps": 9, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"},
        checkpoint={"interval": 2, "export_hf": False},
        resilience={"max_skipped_steps": 3, "retry_bad_steps": False},
    )
    results = run_ranks(poisoned_rank, 2, config, {2: "nan", 4: "nan", 5: "nan", 6: "nan"})
    assert [code for code, _ in results] == [1, 1]
    message = results[0][1]
    assert "3 steps in a row were skipped" in message and "the last one was step 6" in message
    assert "step_00000004" in message and "--step 6" in message
