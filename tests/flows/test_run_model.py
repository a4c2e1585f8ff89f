"""Which model a run's directory stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.flows.run_model import model_of_run
from meditron_train.train.saving.exports import export_run
from tests.checkpoint.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, which says that the older one is the latest."""
    root = tmp_path_factory.mktemp("finished")
    checkpoints = root / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (1, 2):
        hf_to_sharded(write_tiny_llama(root / f"source{step}", seed=step), checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text("step_00000001\n")
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_another_directory_stands_for_itself(tmp_path: Path) -> None:
    assert model_of_run(tmp_path) == tmp_path
    assert model_of_run(tmp_path / "nothing") == tmp_path / "nothing"


def test_the_newest_checkpoint_where_nothing_is_exported(run: Path) -> None:
    assert model_of_run(run) == run / "checkpoints" / "step_00000002"


def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    (run / "checkpoints" / "step_00000002" / ".metadata").unlink()
    assert model_of_run(run) == run / "checkpoints" / "step_00000001"


def test_an_export_of_the_newest_checkpoint(run: Path) -> None:
    export_run(run / "checkpoints" / "step_00000002", run / "hf")
    assert model_of_run(run) == run / "hf"


def test_an_older_export_is_not_taken(run: Path) -> None:
    export_run(run / "checkpoints" / "step_00000001", run / "hf")
    assert model_of_run(run) == run / "checkpoints" / "step_00000002"
    (run / "hf" / "README.md").write_text("Our model card")  # so that the next export goes beside
    beside = export_run(run / "checkpoints" / "step_00000002", run / "hf")
    assert model_of_run(run) == beside != run / "hf"


def test_the_export_outlives_the_checkpoints(run: Path) -> None:
    export_run(run / "checkpoints" / "step_00000002", run / "hf")
    for checkpoint in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(checkpoint)
    assert model_of_run(run) == run / "hf"
