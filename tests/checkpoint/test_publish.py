"""publish: a directory appears complete or not at all, and nothing of anybody else's is touched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.publish import publish
from meditron_train.errors import MeditronError
from tests.refusal import refused


def test_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with publish(target) as temporary:
        (temporary / "a").write_text("1")
        assert temporary.name == "model.tmp"
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert not temporary.exists()


def test_with_manifest(tmp_path: Path) -> None:
    with publish(tmp_path / "model", with_manifest=True) as temporary:
        (temporary / "a").write_text("1")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "manifest.json"]
    assert verify_manifest(tmp_path / "model") == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "model"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with refused("No space left", "model", kind=MeditronError), publish(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        refused("would be written", "GB free", kind=MeditronError),
        publish(tmp_path / "model", num_bytes=1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with publish(tmp_path / "empty") as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "empty" / "a").exists()
    with refused("empty exists and is not empty"), publish(tmp_path / "empty"):
        pass
    (tmp_path / "file").touch()
    with refused("file exists and is not a directory"), publish(tmp_path / "file"):
        pass


def test_what_a_killed_attempt_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    attempt = publish(tmp_path / "model")
    temporary = attempt.__enter__()  # and never left, as after kill -9
    (temporary / "half").touch()
    with publish(tmp_path / "model") as again:
        assert not (again / "half").exists()
    somebody = tmp_path / "other.tmp"
    somebody.mkdir()
    (somebody / "thesis").touch()
    with refused("other.tmp is in the way"), publish(tmp_path / "other"):
        pass
    assert (somebody / "thesis").exists()
