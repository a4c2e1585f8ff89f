"""The manifest: what is listed, and what is found to be wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess

import pytest

from meditron_train.checkpoint.manifest import verify_manifest, write_manifest
from tests.checkpoint.filled import fill
from tests.hostile import check


def test_manifest_lists_every_file_and_holds(tmp_path):
    fill(tmp_path, num_bytes=12_345)
    manifest = write_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert set(manifest["files"]) == {"__0_0.distcp", "__1_0.distcp", "empty", "hf/config.json"}
    assert manifest["files"]["__0_0.distcp"]["num_bytes"] == 12_345
    sha256_of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest["files"]["empty"] == {"num_bytes": 0, "sha256": sha256_of_nothing}
    assert verify_manifest(tmp_path) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_larger_than_one_block_are_hashed_whole(tmp_path):
    content = random.Random(1).randbytes(9 * 1024 * 1024 + 7)
    (tmp_path / "big").write_bytes(content)
    expected = subprocess.check_output(["sha256sum", tmp_path / "big"], text=True).split()[0]
    assert write_manifest(tmp_path)["files"]["big"] == {"num_bytes": len(content), "sha256": expected}


def test_one_flipped_bit_is_found_by_its_hash_only(tmp_path):
    fill(tmp_path)
    write_manifest(tmp_path)
    content = bytearray((tmp_path / "__1_0.distcp").read_bytes())
    content[517] ^= 0x10
    (tmp_path / "__1_0.distcp").write_bytes(content)
    assert verify_manifest(tmp_path, check_hashes=False) == []
    (problem,) = verify_manifest(tmp_path)
    assert problem.startswith("__1_0.distcp has changed")


def test_missing_truncated_and_additional_files_are_named(tmp_path):
    fill(tmp_path)
    write_manifest(tmp_path)
    (tmp_path / "hf" / "config.json").unlink()
    os.truncate(tmp_path / "__0_0.distcp", 999)
    (tmp_path / "hf" / "surprise").touch()
    assert sorted(verify_manifest(tmp_path)) == [
        "__0_0.distcp has 999 bytes instead of 1000",
        "hf/config.json is missing",
        "hf/surprise is not in the manifest",
    ]


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path, what):
    fill(tmp_path)
    write_manifest(tmp_path)
    (tmp_path / "empty").unlink()  # of the size that a pipe and a device have, too
    if what == "pipe":
        os.mkfifo(tmp_path / "empty")
    else:
        (tmp_path / "empty").symlink_to("/dev/zero")
    check(lambda: verify_manifest(tmp_path))
    assert verify_manifest(tmp_path) == ["empty is not a file"]


def test_what_a_download_adds_is_no_problem(tmp_path):
    """As `hf download --local-dir` and `git clone` do."""
    fill(tmp_path)
    write_manifest(tmp_path)
    added = (".cache/huggingface/download/empty.metadata", ".git/HEAD", ".gitattributes")
    for name in (*added, ".cache/other", "hf/.gitattributes", ".github/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert verify_manifest(tmp_path) == [
        ".cache/other is not in the manifest",
        ".github/x is not in the manifest",
        "hf/.gitattributes is not in the manifest",
    ]
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path)
    (tmp_path / ".gitattributes").write_text("x")
    assert verify_manifest(tmp_path) == [".gitattributes has 1 bytes instead of 0"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": {"a": 3}}', '{"files": {"a": {"num_bytes": "x"}}}']
)
def test_an_unreadable_manifest_is_a_problem_not_a_crash(tmp_path, text):
    fill(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    (problem,) = verify_manifest(tmp_path)
    assert problem.startswith("manifest.json cannot be read")


def test_no_manifest_and_no_directory(tmp_path):
    fill(tmp_path)
    assert verify_manifest(tmp_path) == ["manifest.json is missing"]
    assert verify_manifest(tmp_path / "nowhere") == ["manifest.json is missing"]
