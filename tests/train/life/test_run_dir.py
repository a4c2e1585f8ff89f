from __future__ import annotations

import errno
from pathlib import Path

import pytest

from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.errors import MeditronError, UserError
from meditron_train.train.life import run_dir as run_dir_module
from meditron_train.train.life.run_dir import RunDir


def make_config(**changes) -> Config:
    """A configuration; `changes` are section__key=value."""
    values: dict = {
        "model": {"from": "/models/llama"},
        "data": {"tokenizer": "/models/llama", "train": [{"name": "pubmed", "path": "/data/pubmed"}]},
        "train": {"steps": 100, "seq_len": 128, "global_batch_size": 8},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be created.*choose another logging\.run_dir"):
        RunDir(tmp_path / "file" / "run").lock()

    def no_space(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", no_space)
    with pytest.raises(MeditronError, match="No space left") as caught:
        RunDir(tmp_path / "run").create()
    assert caught.value.exit_code == 1


# --- structure and configuration


def test_structure_and_config(tmp_path):
    run_dir = RunDir(tmp_path / "a" / "run")
    run_dir.create()
    run_dir.create()
    assert run_dir.checkpoints.is_dir()
    assert run_dir.logs.is_dir()
    config = make_config(train__seed=7)
    run_dir.write_config(config)
    assert load_config(run_dir.config_file) == config
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["checkpoints", "config.yaml", "logs"]


def test_a_start_is_a_resume_once_a_checkpoint_is_finished(tmp_path):
    run_dir = RunDir(tmp_path)
    assert not run_dir.has_checkpoints()
    run_dir.create()
    (run_dir.checkpoints / "step_00000010.tmp").mkdir()
    (run_dir.checkpoints / "latest").touch()
    assert not run_dir.has_checkpoints()
    (run_dir.checkpoints / "step_00000005").mkdir()
    assert run_dir.has_checkpoints()


def test_a_full_disk_at_the_config(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.write_config(make_config())

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir_module, "dump_config", no_space)
    with pytest.raises(MeditronError, match=r"config\.yaml cannot be written.*No space left"):
        run_dir.write_config(make_config(train__seed=7))
    assert load_config(run_dir.config_file) == make_config()
