from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.errors import MeditronError, UserError
from meditron_train.train import run_dir as run_dir_module
from meditron_train.train.run_dir import RunDir


@pytest.fixture
def messages():
    """What the module logs, whatever logging was set up by others."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("meditron_train.train.run_dir")
    level, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.level = level


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


def start_owner(path: Path) -> subprocess.Popen:
    code = (
        "import sys\nfrom pathlib import Path\nfrom meditron_train.train.run_dir import RunDir\n"
        "run_dir = RunDir(Path(sys.argv[1]))\nrun_dir.lock()\nprint('locked', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


# --- the lock


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
    owner = start_owner(tmp_path / "run")
    try:
        with pytest.raises(UserError) as caught:
            RunDir(tmp_path / "run").lock()
        text = str(caught.value)
        assert f"process {owner.pid} on host {socket.gethostname()} since 20" in text
        assert "logging.run_dir" in text
        assert caught.value.exit_code == 2
    finally:
        owner.communicate()
    with RunDir(tmp_path / "run").locked():
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, messages):
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    run_dir = RunDir(tmp_path)
    run_dir.lock()
    assert len(messages) == 1
    assert f"left locked by process {owner.pid}" in messages[0]
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunDir(tmp_path).lock()
    run_dir.unlock()


def test_unlock_gives_it_back_without_a_trace(tmp_path, messages):
    run_dir = RunDir(tmp_path)
    run_dir.unlock()
    for _ in range(2):
        with run_dir.locked():
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / ".lock").read_text() == ""
    with pytest.raises(RuntimeError), run_dir.locked():
        raise RuntimeError
    with RunDir(tmp_path).locked():
        pass
    assert messages == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0\0"])
def test_an_unreadable_owner_does_not_matter(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with RunDir(tmp_path).locked():
        pass


def test_a_lock_held_without_a_name(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by a process that has not given its name yet"):
            RunDir(tmp_path).lock()


def without_flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def write_owner(path: Path, pid: int, host: str) -> None:
    (path / ".lock").write_text(json.dumps({"pid": pid, "host": host, "since": "2024-01-01T00:00:00+00:00"}))


def test_without_file_locks_the_name_decides(tmp_path, monkeypatch, messages):
    monkeypatch.setattr(run_dir_module.fcntl, "flock", without_flock)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    write_owner(tmp_path, finished.pid, socket.gethostname())
    with RunDir(tmp_path).locked():
        assert any("has no file locks" in message for message in messages)
        assert any(f"left locked by process {finished.pid}" in message for message in messages)
        with pytest.raises(UserError, match=r"remove .*\.lock"):
            RunDir(tmp_path).lock()
    write_owner(tmp_path, finished.pid, "another-host")  # nobody can tell from here
    with pytest.raises(UserError, match=r"on host another-host since 2024-01-01.*remove .*\.lock"):
        RunDir(tmp_path).lock()


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


@pytest.fixture
def resumed(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    (run_dir.checkpoints / "step_00000005").mkdir()
    run_dir.write_config(make_config())
    return run_dir


def test_the_same_configuration_resumes(resumed, messages):
    resumed.check_resumable(make_config())
    assert messages == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model__from": "/models/other"}, "model.from: '/models/llama' -> '/models/other'"),
        ({"data__tokenizer": "/t"}, "data.tokenizer: '/models/llama' -> '/t'"),
        ({"data__packing": "concat"}, "data.packing: 'best_fit' -> 'concat'"),
        ({"data__seed": 1}, "data.seed: 1234 -> 1"),
        ({"data__special_tokens": ["[bib]"]}, "data.special_tokens: [] -> ['[bib]']"),
        ({"data__validation_fraction": 0.1}, "data.validation_fraction: 0.0 -> 0.1"),
        (
            {"data__train": [{"name": "pubmed", "path": "/data/pubmed", "weight": 2.0}]},
            "data.train[0].weight: 1.0 -> 2.0",
        ),
        ({"train__seq_len": 64}, "train.seq_len: 128 -> 64"),
        ({"train__global_batch_size": 16}, "train.global_batch_size: 8 -> 16"),
        ({"train__batch_ramp": {"start": 2, "increment": 2, "samples": 9}}, "train.batch_ramp: None -> {"),
        ({"train__seed": 1}, "train.seed: 1234 -> 1"),
        ({"train__precision": "fp32"}, "train.precision: 'bf16' -> 'fp32'"),
    ],
)
def test_another_model_or_other_data_are_refused(resumed, changes, line):
    with pytest.raises(UserError) as caught:
        resumed.check_resumable(make_config(**changes))
    assert f"  - {line}" in str(caught.value)
    assert str(caught.value).count("  - ") == 1


def test_every_difference_is_listed_at_once(resumed):
    two = [{"name": "pubmed", "path": "/data/pubmed"}, {"name": "papers", "path": "/data/papers"}]
    with pytest.raises(UserError) as caught:
        resumed.check_resumable(make_config(data__train=two, train__seed=1, train__steps=7))
    assert str(caught.value).count("  - ") == 2
    assert "data.train: " in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_layout_length_logging_and_optimizer_may_change(resumed, messages):
    changed = make_config(
        parallel__tensor=2,
        train__steps=200,
        train__micro_batch_size=4,
        train__recompute="full",
        checkpoint__interval=7,
        logging__wandb="offline",
        optimizer__lr=1e-4,
        data__prefetch=5,
        data__validation=[{"name": "pubmed", "path": "/data/heldout"}],
    )
    resumed.check_resumable(changed)
    assert len(messages) == 1
    for part in ("parallel.tensor: 1 -> 2", "train.steps: 100 -> 200", "optimizer.lr: 0.0003 -> 0.0001"):
        assert part in messages[0]


def test_without_a_checkpoint_anything_goes(resumed):
    (resumed.checkpoints / "step_00000005").rmdir()
    resumed.check_resumable(make_config(model__from="/models/other"))


def test_keys_of_a_later_version_are_not_held_against_an_older_run(resumed):
    values = yaml.safe_load(resumed.config_file.read_text())
    del values["data"]["packing"]
    resumed.config_file.write_text(yaml.safe_dump(values))
    resumed.check_resumable(make_config(data__packing="concat"))


def test_a_dollar_in_a_path_is_no_difference(resumed):
    config = make_config(model__from="/models/${odd}")
    resumed.write_config(config)
    resumed.check_resumable(config)


def test_an_unreadable_config_beside_checkpoints_is_refused(resumed):
    resumed.config_file.write_text("{")
    with pytest.raises(UserError, match=r"(?s)cannot be read.*meta\.json has a copy"):
        resumed.check_resumable(make_config())


def test_a_full_disk_at_the_config(resumed, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir_module, "dump_config", no_space)
    with pytest.raises(MeditronError, match=r"config\.yaml cannot be written.*No space left"):
        resumed.write_config(make_config())
    assert load_config(resumed.config_file) == make_config()
