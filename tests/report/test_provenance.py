from __future__ import annotations

import subprocess
import sys

import torch

from meditron_train.report.json_lines import encode_line, read_json_lines
from meditron_train.report.provenance import append_provenance, collect_provenance, config_hash


def test_a_record_says_what_the_run_was_started_with():
    record = collect_provenance(
        {"train": {"steps": 3}},
        {"pubmed": "abc"},
        {"kind": "torchrun", "hosts": ["n1", "n2"], "world_size": 2},
    )
    assert record["config_sha256"] == config_hash({"train": {"steps": 3}})
    assert record["versions"]["torch"] == torch.__version__
    assert "megatron-core" in record["versions"]
    assert "meditron-train" in record["versions"]
    assert record["data_fingerprints"] == {"pubmed": "abc"}
    assert record["launch"] == {"kind": "torchrun", "hosts": ["n1", "n2"], "world_size": 2}
    assert record["command"] == sys.argv
    assert record["time"].endswith("+00:00")
    encode_line(record)


def test_the_config_hash_sees_values_not_the_order_of_keys():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 1.5})
    assert len(config_hash({})) == 64


def test_git_commit_and_modification(tmp_path, monkeypatch):
    from meditron_train.report import provenance

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.check_output(["git", "-C", tmp_path, *identity, *arguments], text=True).strip()

    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert provenance._git_state(tmp_path) is None
    git("init", "-q")
    assert provenance._git_state(tmp_path) is None  # inside a repository, but not part of it
    git("add", "__init__.py")
    git("commit", "-q", "-m", "first")
    assert provenance._git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "__init__.py").write_text("x = 2\n")
    assert provenance._git_state(tmp_path)["modified"] is True
    monkeypatch.setenv("PATH", "")
    assert provenance._git_state(tmp_path) is None


def test_records_are_appended_even_after_a_torn_line(tmp_path):
    append_provenance(tmp_path, {"start": 1})
    append_provenance(tmp_path, {"start": 2})
    file = tmp_path / "provenance.jsonl"
    assert read_json_lines(file) == [{"start": 1}, {"start": 2}]
    file.write_bytes(file.read_bytes() + b'{"start"')
    append_provenance(tmp_path, {"start": 4})
    assert read_json_lines(file) == [{"start": 1}, {"start": 2}, {"start": 4}]
