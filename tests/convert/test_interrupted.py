"""A conversion killed at any moment leaves nothing that looks finished; running it again continues and completes it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meditron_train.checkpoint import conversion, megatron_write
from meditron_train.checkpoint.export import export_hf
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.workspace import Workspace
from meditron_train.convert.hf_to_megatron import hf_to_megatron
from meditron_train.convert.verify import verify
from tests.checkpoint.tiny_llama import change_json, write_tiny_llama

# Every call that changes the disk is a moment at which the process may die: before it, or after it.
KILLED_AT_A_MOMENT = """
import builtins, os, pathlib, signal, sys
from meditron_train.checkpoint import megatron_write
from meditron_train.checkpoint.export import export_hf
from meditron_train.convert.hf_to_megatron import hf_to_megatron

direction, source, target, moment = sys.argv[1:]
megatron_write._MAX_FILE_BYTES = 30_000
left = int(moment)

def deadly(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
for name in ("unlink", "rename", "mkdir", "write_text"):
    setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
options = {"max_shard_size": "30KB"} if direction == "from" else {}
{"to": hf_to_megatron, "from": export_hf}[direction](source, target, **options)
print(left)
"""


def attempt(direction: str, source: Path, target: Path, moment: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED_AT_A_MOMENT, direction, str(source), str(target), str(moment)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    monkeypatch.setattr(megatron_write, "_MAX_FILE_BYTES", 30_000)
    hf = write_tiny_llama(tmp_path / "hf", max_shard_size="60KB")
    hf_to_megatron(hf, tmp_path / "checkpoint")
    return {"to": hf, "from": tmp_path / "checkpoint"}


@pytest.mark.parametrize("direction", ["to", "from"])
def test_killed_at_random_moments_and_run_again(
    tmp_path: Path, sources: dict[str, Path], direction: str
) -> None:
    source, target = sources[direction], tmp_path / "target"
    before = {path.name for path in tmp_path.iterdir()}
    probe = attempt(direction, source, tmp_path / "probe", 1_000_000)
    num_moments = 1_000_000 - int(probe.stdout)
    assert num_moments > 30
    dice = random.Random(direction)
    moment, num_kills = dice.randint(4, 12), 0
    while (run := attempt(direction, source, target, moment)).returncode == -signal.SIGKILL:
        assert not target.exists()
        num_kills += 1
        moment += dice.randint(6, 16)  # each attempt has less to do, so this ends
    assert run.returncode == 0, run.stderr
    assert num_kills >= 2
    assert {path.name for path in tmp_path.iterdir()} == {*before, "probe", "target"}
    assert verify_manifest(target) == []
    assert verify(source, target).differences == ()
    names = {path.name for path in (tmp_path / "probe").rglob("*")}
    assert {path.name for path in target.rglob("*")} == names


def test_killed_just_before_it_is_published(tmp_path: Path, sources: dict[str, Path]) -> None:
    target = tmp_path / "target"
    num_moments = 1_000_000 - int(attempt("to", sources["to"], tmp_path / "probe", 1_000_000).stdout)
    for moment in range(num_moments - 6, num_moments + 1):  # the last removals, syncs and the rename
        assert attempt("to", sources["to"], target, moment).returncode in (0, -signal.SIGKILL)
        if target.exists():
            break
    else:
        hf_to_megatron(sources["to"], target)
    assert verify_manifest(target) == []
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


def interrupt(sources: dict[str, Path], target: Path, moment: int = 12) -> list[str]:
    """Kill a conversion and return the files that it, or an attempt before, had finished."""
    assert attempt("to", sources["to"], target, moment).returncode == -signal.SIGKILL
    return sorted(Workspace(target.with_name(target.name + ".tmp"), 0)._known)


def test_finished_files_are_kept_if_their_hash_holds(
    tmp_path: Path, sources: dict[str, Path], monkeypatch
) -> None:
    target = tmp_path / "target"
    finished: list[str] = []
    while len(finished) < 3:  # an attempt continues the one before
        finished = interrupt(sources, target)
    spoilt = tmp_path / "target.tmp" / finished[0]
    raw = bytearray(spoilt.read_bytes())
    raw[len(raw) // 2] ^= 1
    spoilt.write_bytes(raw)
    names = written_files(monkeypatch)
    hf_to_megatron(sources["to"], target)
    assert finished[0] in names and not set(finished[1:]) & set(names)
    assert verify(sources["to"], target).differences == ()


def test_another_conversion_starts_anew(tmp_path: Path, sources: dict[str, Path], monkeypatch) -> None:
    target = tmp_path / "target"
    interrupt(sources, target, 30)
    names = written_files(monkeypatch)
    change_json(sources["to"] / "generation_config.json", temperature=0.5)  # the source is not what it was
    hf_to_megatron(sources["to"], target)
    assert sorted(names) == sorted(path.name for path in target.glob("*.distcp"))


def test_ctrl_c_can_be_continued(tmp_path: Path, sources: dict[str, Path], monkeypatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(sources["to"], tmp_path / "target")
    finished = sorted(Workspace(tmp_path / "target.tmp", 0)._known)
    assert len(finished) > 3
    names = written_files(monkeypatch)
    hf_to_megatron(sources["to"], tmp_path / "target")
    assert not set(finished) & set(names)
    assert verify(sources["to"], tmp_path / "target").differences == ()
