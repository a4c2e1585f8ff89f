"""Workspace: a directory appears complete or not at all, and nothing of anybody else's is touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.stream import WrittenFile
from meditron_train.checkpoint.convert.workspace import Alone, Workspace, publish, require_absent, workspace
from meditron_train.checkpoint.files.stored import ReadError
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.planned import PlannedFile
from meditron_train.errors import MeditronError
from tests.refusal import refused

PLANS = [PlannedFile("a", (), 1)]
SHA256_OF_1 = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
WRITTEN = WrittenFile(1, SHA256_OF_1, {"w": "00"})


def write(work: Workspace) -> None:
    (work.directory / "a").write_text("1")
    work.record("a", WRITTEN)


def test_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with workspace(target, PLANS, {}, Alone()) as work:
        write(work)
        (work.directory / "sub").mkdir()
        (work.directory / "sub" / "b").write_text("2")
        assert work.directory.name == "model.tmp" and not target.exists()
        publish(work, target, {"a": WRITTEN}, {"more": 3})
    assert sorted(path.name for path in target.rglob("*")) == ["a", "b", "manifest.json", "sub"]
    assert not work.directory.exists()
    assert verify_manifest(target) == []
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["more"] == 3
    assert manifest["files"]["a"] == {"num_bytes": 1, "sha256": SHA256_OF_1}


def test_an_error_leaves_nothing_and_an_interruption_leaves_the_work(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        write(work)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        write(work)
        raise KeyboardInterrupt
    with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        assert work.finished(PLANS[0]) == WRITTEN
        assert work.finished(PlannedFile("a", (), 2)) is None
        (work.directory / "a").write_text("2")
        assert work.finished(PLANS[0]) is None
        (work.directory / "a").unlink()
        assert work.finished(PLANS[0]) is None


def test_another_identity_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "model", PLANS, {"x": 1}, Alone()) as work:
        write(work)
        raise KeyboardInterrupt
    with workspace(tmp_path / "model", PLANS, {"x": 2}, Alone()) as work:
        assert not (work.directory / "a").exists() and work.finished(PLANS[0]) is None


def test_a_torn_journal_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        write(work)
        (journal,) = work.directory.glob(".finished_*")
        journal.write_text(journal.read_text() + '{"name": "b", "num_by')
        assert set(Workspace(work.directory, 3)._known) == {"a"}


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with (
        refused("no space left", "model", kind=MeditronError),
        workspace(tmp_path / "model", PLANS, {}, Alone()),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    huge = [PlannedFile("a", (), 1 << 60)]
    with (
        refused("would be written", " free", kind=MeditronError),
        workspace(tmp_path / "model", huge, {}, Alone()),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_needs_no_space(tmp_path: Path, monkeypatch) -> None:
    plans = [PlannedFile("a", (), 8192)]
    with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "model", plans, {}, Alone()) as work:
        (work.directory / "a").write_bytes(b"1" * 8192)
        os.sync()
        raise KeyboardInterrupt
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with workspace(tmp_path / "model", plans, {}, Alone()):
        pass


class _Usage:
    free = 4096


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with workspace(tmp_path / "empty", PLANS, {}, Alone()) as work:
        write(work)
        publish(work, tmp_path / "empty", {"a": WRITTEN}, {})
    assert (tmp_path / "empty" / "a").exists()
    with refused("empty exists and is not empty"), workspace(tmp_path / "empty", PLANS, {}, Alone()):
        pass
    (tmp_path / "file").touch()
    with refused("file exists and is not a directory"), workspace(tmp_path / "file", PLANS, {}, Alone()):
        pass


def test_two_at_a_time_and_somebody_elses_directory(tmp_path: Path) -> None:
    with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        write(work)
        with refused("being written by another process"), workspace(tmp_path / "model", PLANS, {}, Alone()):
            pass
        assert (work.directory / "a").exists()
    somebody = tmp_path / "other.tmp"
    somebody.mkdir()
    (somebody / "thesis").touch()
    with refused("other.tmp is in the way"), workspace(tmp_path / "other", PLANS, {}, Alone()):
        pass
    assert (somebody / "thesis").exists()


@pytest.mark.parametrize("kept", ["manifest.json", ".lock", ".conversion.json"])
def test_somebody_elses_directory_that_looks_like_ours(tmp_path: Path, kept: str) -> None:
    """A finished conversion moved out of the way, a directory of another program: neither is an interrupted one."""
    with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        write(work)
        publish(work, tmp_path / "model", {"a": WRITTEN}, {})
    backup = tmp_path / "model.tmp"
    (tmp_path / "model").rename(backup)
    if kept != "manifest.json":
        (backup / "manifest.json").rename(backup / kept)
    before = sorted(path.name for path in backup.iterdir())
    with refused("model.tmp is in the way"), workspace(tmp_path / "model", PLANS, {}, Alone()):
        pass
    assert sorted(path.name for path in backup.iterdir()) == before


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.tmp").symlink_to(tmp_path / "elsewhere")
    with refused("model.tmp is in the way"), workspace(tmp_path / "model", PLANS, {}, Alone()):
        pass


def test_what_was_killed_at_once_is_ours(tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()
    for name in (".lock", ".conversion.json.tmp"):
        (tmp_path / "model.tmp" / name).touch()
        with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
            write(work)
            publish(work, tmp_path / "model", {"a": WRITTEN}, {})
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "manifest.json"]
        (tmp_path / "model").rename(tmp_path / name)
        (tmp_path / "model.tmp").mkdir()


def test_a_link_to_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with workspace(tmp_path / "link", PLANS, {}, Alone()) as work:
        write(work)
        publish(work, tmp_path / "link", {"a": WRITTEN}, {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    with refused("volume is a mount point", "inside it"), workspace(tmp_path / "volume", PLANS, {}, Alone()):
        pass
    assert not (tmp_path / "volume.tmp").exists()


def test_a_path_that_cannot_be_one_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("model cannot be written"), workspace(tmp_path / "file" / "model", PLANS, {}, Alone()):
        pass


def test_a_source_that_cannot_be_read_keeps_the_work(tmp_path: Path) -> None:
    with (
        refused("cannot be read", kind=ReadError),
        workspace(tmp_path / "model", PLANS, {}, Alone()) as work,
    ):
        write(work)
        raise ReadError("x: w cannot be read")
    with workspace(tmp_path / "model", PLANS, {}, Alone()) as work:
        assert work.finished(PLANS[0]) == WRITTEN


def test_on_inside_or_above_an_input(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "new.tmp" / "config").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    inputs = (tmp_path / "source", None, tmp_path / "tokenizer", tmp_path / "new.tmp" / "config")
    for target, how in (
        (tmp_path / "source", "is"),
        (tmp_path / "link", "is"),
        (tmp_path / "source" / "new", "lies inside"),
        (tmp_path / "link" / "a" / "b", "lies inside"),
        (tmp_path / "tokenizer" / "new", "lies inside"),
        (tmp_path, "contains"),
        (tmp_path / "new", "contains"),  # its workspace does
    ):
        with refused(f" {how} {tmp_path}", "which would change it"):
            require_absent(target, *inputs)
    require_absent(tmp_path / "source2", *inputs)
