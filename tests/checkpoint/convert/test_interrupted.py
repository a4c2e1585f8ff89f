"""A conversion killed at any moment leaves nothing that looks finished; running it again continues and completes it."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.convert import engine as conversion
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.workspace import Workspace
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.sharded import plan as sharded_plan
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import change_json, write_tiny_llama


def attempt(direction: str, source: Path, target: Path, moment: int) -> int | None:
    """Convert in a forked process that kills itself at a moment: before the call of that number, counted from 1, of
    those that change the disk. None when it was killed, else how many such calls there were."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            left = _convert(direction, source, target, moment)
            os.write(writer, str(moment - left).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert said or os.WTERMSIG(status) == signal.SIGKILL
    return int(said) if said else None


def _convert(direction: str, source: Path, target: Path, moment: int) -> int:
    left = moment

    def deadly(function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    for name in ("unlink", "rename", "mkdir", "write_text"):
        setattr(Path, name, deadly(getattr(Path, name)))
    options: dict[str, Any] = {"max_shard_size": "30KB"} if direction == "from" else {}
    {"to": hf_to_sharded, "from": export_hf}[direction](source, target, **options)
    return left


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    monkeypatch.setattr(sharded_plan, "_MAX_FILE_BYTES", 30_000)
    hf = write_tiny_llama(tmp_path / "hf", max_shard_size="60KB")
    hf_to_sharded(hf, tmp_path / "checkpoint")
    return {"to": hf, "from": tmp_path / "checkpoint"}


@pytest.mark.long
@pytest.mark.parametrize("direction", ["to", "from"])
def test_killed_at_every_moment_and_run_again(
    tmp_path: Path, sources: dict[str, Path], direction: str
) -> None:
    source, target = sources[direction], tmp_path / "target"
    before = {path.name for path in tmp_path.iterdir()}
    num_moments = attempt(direction, source, target, 1_000_000)
    assert num_moments is not None and num_moments > 25
    names = {path.relative_to(target) for path in target.rglob("*")}
    for moment in range(1, num_moments + 1):
        if target.exists():
            shutil.rmtree(target)
        if attempt(direction, source, target, moment) is None and target.exists():
            assert verify_manifest(target) == []  # killed after the rename: it is finished
            continue
        if not target.exists():
            assert attempt(direction, source, target, 1_000_000) is not None
        assert {path.name for path in tmp_path.iterdir()} == {*before, "target"}
        assert {path.relative_to(target) for path in target.rglob("*")} == names
        assert verify_manifest(target) == []
        assert verify(source, target).differences == ()


@pytest.mark.parametrize("direction", ["to", "from"])
def test_killed_again_and_again_it_is_completed(
    tmp_path: Path, sources: dict[str, Path], direction: str
) -> None:
    source, target = sources[direction], tmp_path / "target"
    dice, num_kills = random.Random(direction), 0
    moment = dice.randint(6, 12)
    while attempt(direction, source, target, moment) is None and not target.exists():
        num_kills += 1
        moment = dice.randint(6, 12 + 6 * num_kills)
    assert num_kills >= 2
    assert verify_manifest(target) == []
    assert verify(source, target).differences == ()
    assert not (tmp_path / "target.tmp").exists()


def written_files(monkeypatch) -> list[str]:
    """The names of files that are finished from now on."""
    names: list[str] = []
    record = Workspace.record

    def remember(work: Workspace, name: str, written: object) -> None:
        names.append(name)
        record(work, name, written)  # type: ignore[arg-type]

    monkeypatch.setattr(Workspace, "record", remember)
    return names


def interrupt(sources: dict[str, Path], target: Path, moment: int) -> list[str]:
    """Kill a conversion and return the files that it, or an attempt before, had finished."""
    assert attempt("to", sources["to"], target, moment) is None
    return sorted(Workspace(target.with_name(target.name + ".tmp"), 0)._known)


def test_finished_files_are_kept_if_their_hash_holds(
    tmp_path: Path, sources: dict[str, Path], monkeypatch
) -> None:
    target = tmp_path / "target"
    finished: list[str] = []
    moment = 12
    while len(finished) < 3:  # an attempt continues the one before
        finished = interrupt(sources, target, moment)
        moment += 6
    spoilt = tmp_path / "target.tmp" / finished[0]
    raw = bytearray(spoilt.read_bytes())
    raw[len(raw) // 2] ^= 1
    spoilt.write_bytes(raw)
    names = written_files(monkeypatch)
    hf_to_sharded(sources["to"], target)
    assert finished[0] in names and not set(finished[1:]) & set(names)
    assert verify(sources["to"], target).differences == ()


def test_another_conversion_starts_anew(tmp_path: Path, sources: dict[str, Path], monkeypatch) -> None:
    target = tmp_path / "target"
    interrupt(sources, target, 30)
    names = written_files(monkeypatch)
    change_json(sources["to"] / "generation_config.json", temperature=0.5)  # the source is not what it was
    hf_to_sharded(sources["to"], target)
    assert sorted(names) == sorted(path.name for path in target.glob("*.distcp"))


def test_ctrl_c_can_be_continued(tmp_path: Path, sources: dict[str, Path], monkeypatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_to_sharded(sources["to"], tmp_path / "target")
    finished = sorted(Workspace(tmp_path / "target.tmp", 0)._known)
    assert len(finished) > 3
    names = written_files(monkeypatch)
    hf_to_sharded(sources["to"], tmp_path / "target")
    assert not set(finished) & set(names)
    assert verify(sources["to"], tmp_path / "target").differences == ()
