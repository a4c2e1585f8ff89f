"""A whole run on a GPU that is stopped, saved and continued ends where an uninterrupted one does, to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.gpu.devices import CUDA, HEAD_DIM, REHEARSAL, REHEARSED, needs_gpus, our_attention
from tests.train.reference import hf_model
from tests.train.test_loop import run, stop_file_after

NUM_STEPS, STOP_AFTER = 8, 4
COMPARED = ("loss", "grad_norm", "param_norm", "lr", "tokens", "num_skipped_steps")


@pytest.fixture
def write_run(write_config, tmp_path):
    """write_run(name, device, precision, **sections) → configuration of a short run in tmp_path/name."""

    def write(name: str, device: str, precision: str, **sections):
        train = {"steps": NUM_STEPS, "precision": precision, "device": device}
        return write_config(
            f"{name}.yaml",
            **{**sections, "train": {**train, **sections.get("train", {})}},
            checkpoint={"interval": 1000},  # only when it stops or ends
            validation={"interval": NUM_STEPS},
            logging={"run_dir": str(tmp_path / name), "wandb": "disabled", "tensorboard": False},
        )

    return write


def numbers(metrics: list[dict]) -> list[list[float]]:
    return [[line[key] for key in COMPARED] for line in metrics]


def weights(run_dir) -> dict[str, torch.Tensor]:
    from meditron_train.checkpoint.sharded.read import ShardedSource

    source = ShardedSource(run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}")
    return {name: source.read(name) for name in source.names}


def assert_resumes(write_run, tmp_path, device, precision, overrides, world_size, **sections):
    whole = run(write_run("whole", device, precision, **sections), *overrides, world_size=world_size)
    config = write_run("parts", device, precision, **sections)
    stop_file_after(config, tmp_path / "parts", step=STOP_AFTER, overrides=overrides, world_size=world_size)
    resumed = run(config, *overrides, world_size=world_size)
    assert [line["step"] for line in resumed] == list(range(1, NUM_STEPS + 1))
    assert numbers(resumed) == numbers(whole)
    assert resumed[-1]["validation_loss.held-out"] == whole[-1]["validation_loss.held-out"]
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert sum(int((~tensor.isfinite()).sum()) for tensor in got.values()) == 0


@pytest.mark.parametrize(
    "device, precision",
    [
        pytest.param("cpu", "bf16", id="cpu-bf16", marks=REHEARSED),
        pytest.param("cuda", "bf16", id="cuda-bf16", marks=CUDA.marks),
        pytest.param("cuda", "fp32", id="cuda-fp32", marks=CUDA.marks),
    ],
)
def test_one_rank_resumes_to_the_bit(write_run, tmp_path, device, precision):
    assert_resumes(write_run, tmp_path, device, precision, (), world_size=1)


@pytest.mark.parametrize("device", [REHEARSAL, CUDA])
def test_our_attention_resumes_to_the_bit(write_run, tmp_path, hf_dir, device):
    """With heads that our kernels take on a GPU, too."""
    from meditron_train.data.tokenizing.tokenizer import load_tokenizer

    train = our_attention(device)
    directory = shutil.copytree(hf_dir, tmp_path / "hf")
    ids = {"vocab_size": load_tokenizer(hf_dir).vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    hf_model(**ids, head_dim=HEAD_DIM).save_pretrained(directory)
    sections = {"model": {"from": str(directory)}, "train": train}
    assert_resumes(write_run, tmp_path, device, "bf16", (), world_size=1, **sections)


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", ""])
@pytest.mark.parametrize("device", [pytest.param("cuda", id="cuda", marks=needs_gpus(2))])
def test_two_ranks_resume_to_the_bit(write_run, tmp_path, device, override):
    overrides = (override,) if override else ()  # without one: data parallel
    assert_resumes(write_run, tmp_path, device, "fp32", overrides, world_size=2)
