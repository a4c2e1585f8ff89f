"""Node-local checkpoints: the same numbers after a restart, and never used when a rank lacks its part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meditron_train.layout import ParallelLayout
from meditron_train.train.saving.local_checkpoints import LocalCheckpoints
from tests.train.guard.test_step import run_with
from tests.train.test_loop import losses, run

SHORT = {"steps": 10, "seq_len": 64, "global_batch_size": 4, "device": "cpu"}


def log(run_dir: Path) -> str:
    return (run_dir / "logs" / "rank_00000.log").read_text()


@pytest.fixture
def start(write_config, tmp_path):
    """start(precision) → configuration of a run that saves at 5 and 10, and every second step locally."""

    def write(precision: str = "fp32", name: str = "run", **checkpoint) -> Path:
        local = {"local_interval": 2, "local_dir": str(tmp_path / "local")}
        return write_config(
            name + ".yaml",
            train={**SHORT, "precision": precision},
            checkpoint={"interval": 5, **local, **checkpoint},
            logging={"run_dir": str(tmp_path / name), "wandb": "disabled", "tensorboard": False},
        )

    return write


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp32", ()),
        pytest.param("bf16", (), marks=pytest.mark.long),
        pytest.param("bf16", ("parallel.distributed_optimizer=false",), marks=pytest.mark.long),
        pytest.param(
            "bf16",
            ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
            marks=pytest.mark.long,
        ),
        pytest.param("fp32", ("parallel.tensor=2",), marks=pytest.mark.long),
    ],
)
def test_a_restart_from_local_checkpoints_is_bit_identical(start, tmp_path, precision, overrides):
    whole = run(start(precision, "whole"), *overrides, world_size=2)
    config = start(precision)
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@9:rank=0,crash@9:rank=1", *overrides)
    assert sorted(path.name for path in (tmp_path / "local").glob("*/rank_00001/*.pt")) == [
        "step_00000006.pt",
        "step_00000008.pt",
    ]
    again = run(config, *overrides, world_size=2)
    assert "resuming from the local checkpoints" in log(tmp_path / "run") and "after step 8" in log(
        tmp_path / "run"
    )
    assert losses(again) == losses(whole)
    assert [line["param_norm"] for line in again] == [line["param_norm"] for line in whole]
    assert not list((tmp_path / "local").rglob("*.pt")), "a finished run leaves nothing on the node"


@pytest.mark.long
@pytest.mark.parametrize("damage", ["missing", "rotten", "one step older"])
def test_a_part_that_one_rank_lacks_makes_all_go_to_what_all_have(start, tmp_path, damage):
    config = start()
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@9:rank=0,crash@9:rank=1")
    (rank_1,) = (tmp_path / "local").glob("*/rank_00001")
    if damage == "missing":
        shutil.rmtree(rank_1)
    else:
        newest = rank_1 / "step_00000008.pt"
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        if damage == "rotten":
            (rank_1 / "step_00000006.json").unlink()
    run(config, world_size=2)
    expected = {"missing": "step_00000005, after step 5", "rotten": "step_00000005, after step 5"}
    assert expected.get(damage, "rank_00000, after step 6") in log(tmp_path / "run")


def other_base(hf_dir: Path, directory: Path) -> Path:
    """A model of the same shape with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_dir, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.long
@pytest.mark.parametrize("correction", ["train.seed=7", "train.global_batch_size=2", "model.from={other}"])
def test_a_corrected_configuration_begins_anew(start, hf_dir, tmp_path, correction):
    """Where no checkpoint that everyone can read says what the run was, nothing else refuses it."""
    correction = correction.format(other=other_base(hf_dir, tmp_path / "other"))
    config = start(interval=100)
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@4", world_size=1)
    assert list((tmp_path / "local").rglob("step_00000002.pt"))
    corrected = run(config, correction)
    assert "of another configuration: " + correction.partition("=")[0] in log(tmp_path / "run")
    assert losses(corrected) == losses(run(start(name="new", interval=100), correction))


@pytest.mark.long
def test_adapters_begin_anew_on_other_weights_under_the_same_name(start, hf_dir, tmp_path):
    base = shutil.copytree(hf_dir, tmp_path / "base")
    config, adapters = start(interval=100), (f"model.from={base}", "lora.rank=2")
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@4", *adapters, world_size=2)
    other_base(hf_dir, base)
    run(config, *adapters, world_size=2)
    assert "resuming from the local checkpoints" not in log(tmp_path / "run")


@pytest.mark.long
def test_those_of_earlier_versions_are_read(start, tmp_path):
    config = start(interval=100)
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@4", world_size=1)
    (sidecar,) = (tmp_path / "local").rglob("step_00000002.json")
    facts = json.loads(sidecar.read_text())
    del facts["config"]
    sidecar.write_text(json.dumps(facts))
    run(config)
    assert "after step 2" in log(tmp_path / "run")


@pytest.mark.long
def test_another_layout_uses_the_checkpoints_that_everyone_can_read(start, tmp_path):
    config = start()
    with pytest.raises(AssertionError, match="an injected crash"):
        run_with(config, "crash@9:rank=0,crash@9:rank=1")
    run(config, world_size=1)
    assert "step_00000005, after step 5" in log(tmp_path / "run")


def test_a_local_disk_that_fails_costs_a_warning(start, tmp_path):
    (tmp_path / "local").touch()
    run(start(), world_size=1)
    assert "could not save step 2 locally" in log(tmp_path / "run")


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"progress": []}', '{"progress": {"step": 2, "samples": "x"}}', "{}"]
)
def test_foreign_files_among_them_are_passed_over(tmp_path, text):
    def fingerprint_until(num_samples: int) -> str:
        return str(num_samples + 1)

    plan: Any = SimpleNamespace(
        config=SimpleNamespace(
            checkpoint=SimpleNamespace(local_dir=tmp_path),
            train=SimpleNamespace(precision="fp32", steps=9),
            parallel=SimpleNamespace(distributed_optimizer=False),
            lora=None,
            model_dump=lambda **_: {},
        ),
        layout=ParallelLayout(1),
        model=SimpleNamespace(model_dump=lambda mode: {}),
        train_data=SimpleNamespace(fingerprint_until=fingerprint_until),
    )
    mesh: Any = SimpleNamespace(rank=0, gather_objects=lambda mine: [mine])
    local = tmp_path / "id" / "rank_00000"
    local.mkdir(parents=True)
    for name in ("step_foo.json", "step_00000002.json"):
        (local / name).write_text(text)
    checkpoints = LocalCheckpoints(plan, mesh, "id")
    assert checkpoints.newest() is None
    checkpoints._delete_all_but([])
    assert [path.name for path in local.iterdir()] == ["step_foo.json"]
