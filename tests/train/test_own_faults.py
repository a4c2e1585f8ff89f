"""A run ends by its own faults only, and the files of its people stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from meditron_train.train.guard.injected_faults import VARIABLE
from tests.distributed import run_ranks
from tests.train.test_loop import run, run_rank
from tests.train.test_starts import failure

SHORT = {"steps": 4, "global_batch_size": 2}


@pytest.fixture
def write_small(write_config, tmp_path):
    def write(name: str = "config.yaml", **sections) -> Path:
        return write_config(
            name,
            **{
                "train": SHORT,
                "schedule": {"warmup_steps": 0},
                "checkpoint": {"interval": 2, "export_hf": False},
                **sections,
            },
        )

    return write


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the lock, which names its last owner, and the log of this start."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def failing_export_rank(rank: int, world_size: int, config_file: Path) -> list[str]:
    """Exports fail until the last checkpoint; the exports that are there in the end."""
    from meditron_train.train.saving import run_checkpoints

    tried: list[str] = []
    export = run_checkpoints.export_run

    def sometimes(checkpoint: Path, directory: Path, limits: object) -> Path:
        tried.append(directory.name)
        if checkpoint.name != "step_00000004" and len(tried) < 3:
            raise OSError(28, "No space left on device")
        return export(checkpoint, directory, limits)

    run_checkpoints.export_run = sometimes
    assert run_rank(rank, world_size, config_file) == 0
    return tried


@pytest.mark.long
def test_an_intermediate_export_that_fails_is_tried_again(write_small, tmp_path):
    config = write_small(checkpoint={"interval": 2, "export_hf": False, "export_interval": 1})
    (tried, _) = run_ranks(failing_export_rank, 2, config)
    assert tried[:3] == ["hf_step_00000001", "hf_step_00000001", "hf_step_00000002"]
    for step in range(1, 5):
        assert (tmp_path / "run" / f"hf_step_{step:08d}" / "model.safetensors").is_file()


def lost_exports_rank(rank: int, world_size: int, config_file: Path) -> int:
    """No export works, and the run crashes after the checkpoints of steps 1 to 3."""
    from meditron_train.train.saving import run_checkpoints

    def fails(checkpoint: Path, directory: Path, limits: object) -> Path:
        raise OSError(28, "No space left on device")

    run_checkpoints.export_run = fails
    os.environ[VARIABLE] = "crash@4"
    return run_rank(rank, world_size, config_file)


@pytest.mark.long
def test_an_intermediate_export_that_fails_is_tried_again_by_the_next_start(write_small, tmp_path):
    config = write_small(
        checkpoint={"interval": 1, "keep_last": 2, "export_hf": False, "export_interval": 2},
        train={**SHORT, "steps": 5},
    )
    with pytest.raises(AssertionError, match="an injected crash"):
        run_ranks(lost_exports_rank, 1, config)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(exist_ok=True)  # no checkpoint
    run(config, world_size=2)
    exported = sorted(path.name for path in (tmp_path / "run").glob("hf_*"))
    assert exported == ["hf_step_00000002", "hf_step_00000004"]


def test_a_finished_run_that_is_started_again_changes_nothing(write_small, tmp_path):
    config = write_small(checkpoint={"interval": 2, "export_hf": True})
    run(config)
    (tmp_path / "run" / "hf" / "README.md").write_text("# Our model card")
    before = contents(tmp_path / "run")
    assert run_ranks(run_rank, 2, config, ("validation.steps=1",)) == [0, 0]
    assert contents(tmp_path / "run") == before


def test_a_refused_start_changes_no_file(write_small, tmp_path):
    config = write_small()
    run(config)
    before = contents(tmp_path / "run")
    assert "is further than train.steps = 2" in failure(config, "train.steps=2", "optimizer.lr=1.0e-3")
    assert "another configuration" in failure(config, "train.steps=8", "train.seq_len=32")
    assert contents(tmp_path / "run") == before


def test_a_run_goes_on_when_its_base_model_is_gone(write_small, tmp_path, hf_dir):
    shutil.copytree(hf_dir, tmp_path / "base")
    config = write_small(model={"from": str(tmp_path / "base")})
    run(config)
    shutil.rmtree(tmp_path / "base")
    assert [line["step"] for line in run(config, "train.steps=5")][-1] == 5
    own = tmp_path / "run" / "checkpoints" / "step_00000005"
    assert [line["step"] for line in run(config, "train.steps=6", f"model.from={own}")][-1] == 6


@pytest.mark.long
def test_a_learning_rate_that_jumps_on_a_resume_is_said(write_small, tmp_path):
    config = write_small(schedule={"warmup_steps": None, "warmup_fraction": 0.25})
    run(config)
    run(config, "train.steps=24", world_size=2)
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    other = (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert "the learning rate of step" not in other  # what all would say is said once
    assert "the learning rate of step 5 is 0.0025; with the settings of" in log
    assert "it would be 0.0001" in log
    run(config, "train.steps=25")
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert log.count("the learning rate of step") == 1  # the last one was no jump


@pytest.mark.long
def test_a_batch_without_labels_moves_no_weight(write_small, tmp_path):
    from tests.data.indexed_writer import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "ones", "uint16") as writer:
        for _ in range(400):
            writer.add_document([5])
        for _ in range(4):
            writer.add_document([5, 6, 7] * 20)
    sources = [{"name": "ones", "path": str(tmp_path / "ones")}]
    config = write_small(
        data={"train": sources, "validation": []}, train={**SHORT, "steps": 12, "global_batch_size": 1}
    )
    metrics = run(config)
    empty = [line for line in metrics if not line["num_loss_tokens"]]
    assert 0 < len(empty) < 12
    assert all(line["loss"] is None for line in empty)
    assert metrics[-1]["num_skipped_steps"] == len(empty)
    for before, line in zip(metrics, metrics[1:], strict=False):
        assert (line["param_norm"] == before["param_norm"]) == (not line["num_loss_tokens"])


def test_a_run_without_one_good_step_is_not_done(write_small, tmp_path):
    from tests.data.indexed_writer import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "ones", "uint16") as writer:
        for _ in range(400):
            writer.add_document([5])
    sources = [{"name": "ones", "path": str(tmp_path / "ones")}]
    said = failure(write_small(data={"train": sources, "validation": []}), code=1)
    assert "each of the 4 steps was skipped" in said


def test_validation_before_the_first_step(write_small, tmp_path):
    metrics = run(write_small(validation={"interval": 4, "steps": 2, "at_start": True}))
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert metrics[0]["validation_loss.held-out"] > metrics[4]["validation_loss.held-out"]


def going_back_rank(
    rank: int, world_size: int, config_file: Path, steps: int, from_step: int | None = 2
) -> int:
    from meditron_train.config.load import load_config
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.train.life.stop_signals import StopSignals
    from meditron_train.train.start import train

    config = load_config(config_file, [f"train.steps={steps}"])
    with StopSignals(config.logging.run_dir, checks_files=rank == 0) as signals:
        return train(config, detect_launcher(), signals, from_step=from_step)


@pytest.mark.long
def test_a_run_goes_back_to_a_chosen_checkpoint_once(write_small, tmp_path):
    config = write_small(checkpoint={"interval": 1, "export_hf": False})
    expected = run(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_ranks(going_back_rank, 1, config, 4) == [0]
    again = run(config, "train.steps=4")
    assert [line["loss"] for line in again] == [line["loss"] for line in expected]
    names = {entry.name for entry in checkpoints.iterdir()}
    assert {"step_00000003.set_aside_1", "step_00000004.set_aside_1", "step_00000004"} <= names
    # The same command again, as a requeued job has it, goes on.
    assert run_ranks(going_back_rank, 1, config, 5) == [0]
    assert not (checkpoints / "step_00000004.set_aside_2").exists()
    assert (checkpoints / "step_00000005").is_dir()


def crashing_rank(rank: int, world_size: int, config_file: Path, from_step: int | None) -> int:
    os.environ[VARIABLE] = "crash@4"
    return going_back_rank(rank, world_size, config_file, 5, from_step)


@pytest.mark.long
def test_a_crash_after_going_back_does_not_make_it_go_back_twice(write_small, tmp_path, caplog):
    """The start after the crash finds the chosen checkpoint as the newest one, without a mark that it was chosen."""
    from meditron_train.train.saving.resume import chosen_checkpoint

    config = write_small(checkpoint={"interval": 2, "export_hf": False})
    run(config)
    with pytest.raises(AssertionError, match="an injected crash"):
        run_ranks(crashing_rank, 1, config, 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.glob("step_*")} == {
        "step_00000002",
        "step_00000004.set_aside_1",
    }
    assert run_ranks(going_back_rank, 1, config, 4) == [0]
    assert run_ranks(going_back_rank, 1, config, 5) == [0]
    assert not (checkpoints / "step_00000004.set_aside_2").exists()
    caplog.set_level("INFO", logger="meditron_train")
    assert chosen_checkpoint(checkpoints, 2) == checkpoints / "step_00000005"
    assert "--from-step 2 was obeyed before" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("has_mark", [False, True])
def test_what_lies_on_the_node_from_before_is_not_gone_back_to(write_small, tmp_path, has_mark):
    """Of step 3, where the newest checkpoint that everyone can read is of step 2."""
    local = {"local_interval": 1, "local_dir": str(tmp_path / "local")}
    config = write_small(checkpoint={"interval": 2, "export_hf": False, **local})
    if has_mark:
        run(config)
    with pytest.raises(AssertionError, match="an injected crash"):
        run_ranks(crashing_rank, 1, config, 2 if has_mark else None)
    assert list((tmp_path / "local").rglob("step_00000003.pt"))
    assert run_ranks(going_back_rank, 1, config, 4) == [0]
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    start = log.rpartition("resuming from")[2]
    assert ("after step 3" if has_mark else "step_00000002, after step 2") in start


def test_a_first_start_that_is_refused_creates_nothing(write_small, tmp_path):
    with pytest.raises(AssertionError, match="--from-step 2"):
        run_ranks(going_back_rank, 1, write_small(), 4)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_mixture_that_changes_resumes_exactly(write_small, tmp_path):
    """In one go; and stopped before the change, which is then decided on."""
    phases = [{"from_step": 4, "weights": {"two": 1.0}}]
    train = {**SHORT, "steps": 6}
    whole = write_small(train=train, data={"phases": phases}, logging={"run_dir": str(tmp_path / "whole")})
    expected = run(whole)
    constant = {"kind": "constant", "warmup_steps": 0}
    first = write_small(train={**SHORT, "steps": 3}, schedule=constant)
    run(first)
    second = write_small(train=train, data={"phases": phases}, schedule=constant)
    del expected
    resumed = run(second)
    from meditron_train.data.trace import trace_step

    seen = [
        trace_step(tmp_path / name, step)["segments"] for name in ("run", "whole") for step in range(1, 7)
    ]
    assert seen[:6] == seen[6:]
    assert {row["source"] for step in seen[3:6] for row in step} == {"two"}
    assert [line["step"] for line in resumed] == list(range(1, 7))
    changed = [{"from_step": 4, "weights": {"one": 1.0}}]
    said = failure(write_small(train={**train, "steps": 7}, data={"phases": changed}, schedule=constant))
    assert "a phase of data.phases that had begun, has changed" in said


def test_the_length_of_a_run_in_tokens_epochs_or_budgets(write_small, tmp_path, corpus):
    from meditron_train.config.load import load_config
    from meditron_train.train.length import resolve_steps
    from meditron_train.train.setup import make_plan

    def plan(length, **data):
        config = write_small(train={"steps": None, "global_batch_size": 2, **length}, data=data)
        return make_plan(load_config(config), world_size=1, rank=0)

    assert plan({"tokens": 1000}).config.train.steps == 8  # 2 x 64 tokens each
    per_epoch = plan({"tokens": 1000}).train_data.samples_per_epoch
    assert plan({"epochs": 1.5}).config.train.steps == -(-3 * per_epoch // 4)
    elsewhere = [{"name": "one", "path": str(tmp_path / "elsewhere")}]
    config = load_config(write_small(train={"steps": None, "epochs": 1}, data={"train": elsewhere}))
    unknown, data = resolve_steps(config)
    assert data is None and not unknown.knows_steps
    sources = [{"name": name, "path": str(corpus / name), "token_budget": 3000} for name in ("one", "two")]
    budgeted = plan({}, train=sources)
    steps = budgeted.config.train.steps
    segments = [s for n in range(2 * steps) for s in budgeted.train_data.segments(n)]
    for source in range(2):
        assert 2700 < sum(s.length for s in segments if s.source == source) < 3300
    assert plan({"steps": 3}, train=sources).config.train.steps == 3


@pytest.mark.long
def test_training_on_what_an_earlier_run_held_out_is_said(write_small, tmp_path, corpus, caplog):
    from meditron_train.config.load import load_config
    from meditron_train.train.setup import make_plan

    run(write_small(data={"validation_fraction": 0.2}, checkpoint={"interval": 2, "export_hf": True}))
    validated = {"name": "v", "path": str(corpus / "validation")}
    for base in ("hf", "checkpoints/step_00000004"):
        start = {
            "model": {"from": str(tmp_path / "run" / base)},
            "logging": {"run_dir": str(tmp_path / "next")},
        }

        def warnings(start=start, **data) -> str:
            caplog.clear()
            make_plan(load_config(write_small("next.yaml", **start, data=data)), world_size=1, rank=0)
            return caplog.text

        assert "held out" not in warnings(validation_fraction=0.2, seed=7)
        assert "held out a fraction of 0.2 of the documents of training source one" in warnings(seed=7)
        assert "training source v was a validation source" in warnings(validation=[], train=[validated])
