from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from meditron_train.errors import WRONG_PATH, Cause, cause_of
from meditron_train.files import (
    describe_missing_directory,
    is_disk_fault,
    is_disk_full,
    replace_text,
    replacing,
    sha256_file,
)


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, shared):
    path = tmp_path / "state.json"
    replace_text(path, "old\n", shared=shared)
    with pytest.raises(RuntimeError), replacing(path, shared=shared) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["state.json"]


def test_readers_see_the_old_content_until_the_end(tmp_path):
    path = tmp_path / "latest"
    replace_text(path, "old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_two_writers_of_one_shared_file_do_not_meet(tmp_path):
    path = tmp_path / "status.json"
    with replacing(path, shared=True) as ours:
        ours.write(b"ours")
        other = path.with_name(".status.json.otherhost.1.1.tmp")
        other.write_text("theirs")
        os.replace(other, path)
    assert path.read_text() == "ours"


def test_what_an_error_says_of_the_disk():
    full, share, *broken = (OSError(n, "") for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
    assert is_disk_full(full) and is_disk_full(share) and not any(map(is_disk_full, broken))
    assert all(map(is_disk_fault, (full, share, *broken)))
    assert not is_disk_fault(OSError(errno.ENOENT, ""))


def test_every_errno_has_one_meaning():
    for number in errno.errorcode:
        error = OSError(number, "")
        assert is_disk_fault(error) == (cause_of(error) is Cause.DISK)
        assert not (is_disk_fault(error) and number in WRONG_PATH), errno.errorcode[number]


def test_sha256(tmp_path):
    (tmp_path / "empty").touch()
    assert (
        sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_a_directory_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert describe_missing_directory(Path("file")) == "file is a file; a directory is wanted"
    assert describe_missing_directory(tmp_path / "x") == f"there is no directory {tmp_path}/x"
    command = "hf download meta-llama/Llama-2-7b-hf --local-dir models/Llama-2-7b-hf"
    assert command in describe_missing_directory(Path("meta-llama/Llama-2-7b-hf"))
