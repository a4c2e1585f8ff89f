"""Exports of a run: what is ours is replaced, what is anybody else's stays."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.train.saving import exports
from meditron_train.train.saving.exports import export_run
from tests.checkpoint.tiny_llama import read_tensors, write_tiny_llama


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Two checkpoints of a run, with different weights."""
    found = []
    for step in (1, 2):
        source = tmp_path / f"source{step}"
        write_tiny_llama(source, seed=step)
        checkpoint = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        hf_to_sharded(source, checkpoint)
        found.append(checkpoint)
    return found


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tmp_path / "run" / "hf"


def origin(directory: Path) -> str:
    return json.loads((directory / "manifest.json").read_text())["source"]["directory"]


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_ino, path.read_bytes()) for path in directory.rglob("*") if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_unchanged_export_is_replaced(checkpoints: list[Path], hf: Path) -> None:
    assert export_run(checkpoints[0], hf) == hf
    first = read_tensors(hf)["model.norm.weight"]
    assert export_run(checkpoints[1], hf) == hf
    assert origin(hf) == "step_00000002" and not (read_tensors(hf)["model.norm.weight"] == first).all()
    assert names(hf.parent) == ["checkpoints", "hf"]


def test_the_same_checkpoint_again_changes_nothing(checkpoints: list[Path], hf: Path) -> None:
    export_run(checkpoints[0], hf)
    (hf / "README.md").write_text("a model card")
    (hf / "eval").mkdir()
    (hf / "eval" / "medqa.json").write_text("{}")
    before = snapshot(hf)
    assert export_run(checkpoints[0], hf) == hf
    assert snapshot(hf) == before


@pytest.mark.parametrize("change", ["a file", "a directory", "a link", "an edit", "a bit", "a file less"])
def test_what_people_changed_stays(checkpoints: list[Path], hf: Path, caplog, change: str) -> None:
    export_run(checkpoints[0], hf)
    if change == "a file":
        (hf / "README.md").write_text("a model card")
    elif change == "a directory":
        (hf / "eval").mkdir()
    elif change == "a link":
        (hf / "latest").symlink_to("config.json")
    elif change == "an edit":
        (hf / "generation_config.json").write_text('{"temperature": 0.7}')
    elif change == "a bit":
        raw = bytearray((hf / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (hf / "model.safetensors").write_bytes(raw)
    else:
        (hf / "generation_config.json").unlink()
    before, listed = snapshot(hf), names(hf)
    caplog.set_level(logging.WARNING, "meditron_train")
    assert export_run(checkpoints[1], hf) == hf.with_name("hf_step_00000002")
    assert (snapshot(hf), names(hf)) == (before, listed)
    assert origin(hf.with_name("hf_step_00000002")) == "step_00000002"
    assert "hf is not an unchanged export of ours and stays as it is" in caplog.text
    assert export_run(checkpoints[1], hf) == hf.with_name("hf_step_00000002")  # again: nothing new
    assert names(hf.parent) == ["checkpoints", "hf", "hf_step_00000002"]


def test_another_model_there_is_never_replaced(checkpoints: list[Path], hf: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "source1", hf)
    shutil.copytree(tmp_path / "source2", hf.with_name("hf_step_00000002"))
    before = snapshot(hf) | snapshot(hf.with_name("hf_step_00000002"))
    assert export_run(checkpoints[1], hf) == hf.with_name("hf_step_00000002_2")
    assert snapshot(hf) | snapshot(hf.with_name("hf_step_00000002")) == before


def test_a_link_to_a_moved_export_stays(checkpoints: list[Path], hf: Path, tmp_path: Path) -> None:
    export_run(checkpoints[0], hf)
    hf.rename(tmp_path / "models")
    hf.symlink_to(tmp_path / "models")
    before = snapshot(tmp_path / "models")
    assert export_run(checkpoints[0], hf) == hf
    assert export_run(checkpoints[1], hf) == hf.with_name("hf_step_00000002")
    assert hf.is_symlink() and snapshot(tmp_path / "models") == before


def test_a_link_to_an_empty_directory_is_where_the_export_goes(
    checkpoints: list[Path], hf: Path, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    hf.symlink_to(tmp_path / "scratch")
    assert export_run(checkpoints[0], hf) == hf
    assert hf.is_symlink() and origin(tmp_path / "scratch") == "step_00000001"
    hf.unlink()
    hf.symlink_to(tmp_path / "nowhere")
    assert export_run(checkpoints[0], hf) == hf.with_name("hf_step_00000001")


@pytest.mark.parametrize("with_card", [False, True])
def test_an_export_that_someone_keeps_as_hf_old_stays(
    checkpoints: list[Path], hf: Path, with_card: bool
) -> None:
    export_run(checkpoints[0], hf)
    old = shutil.copytree(hf, hf.with_name("hf.old"))
    shutil.copytree(hf, hf.with_name("hf.new"))
    if with_card:
        (old / "README.md").write_text("the one we showed")
    before = snapshot(old) | snapshot(hf.with_name("hf.new"))
    assert export_run(checkpoints[1], hf) == hf and origin(hf) == "step_00000002"
    assert snapshot(old) | snapshot(hf.with_name("hf.new")) == before
    assert names(hf.parent) == ["checkpoints", "hf", "hf.new", "hf.old"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_between_the_names_loses_no_export(
    checkpoints: list[Path], hf: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    export_run(checkpoints[0], hf)
    calls = []

    def renaming(self: Path, target: Path) -> Path:
        if self.name in ("hf", ".hf.new.tmp"):
            calls.append(self)
            if len(calls) == rename:
                raise Killed
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", renaming)
        export_run(checkpoints[1], hf)
    assert export_run(checkpoints[1], hf) == hf
    assert origin(hf) == "step_00000002" and names(hf.parent) == ["checkpoints", "hf"]


@pytest.mark.parametrize("num_files_gone", [0, 1])
def test_a_kill_before_the_old_export_is_gone(
    checkpoints: list[Path], hf: Path, monkeypatch: pytest.MonkeyPatch, num_files_gone: int
) -> None:
    export_run(checkpoints[0], hf)

    def killed(path: Path) -> None:
        for file in sorted(path.iterdir())[:num_files_gone]:
            file.unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(exports.shutil, "rmtree", killed)
        export_run(checkpoints[1], hf)
    assert export_run(checkpoints[1], hf) == hf
    assert origin(hf) == "step_00000002" and names(hf.parent) == ["checkpoints", "hf"]
