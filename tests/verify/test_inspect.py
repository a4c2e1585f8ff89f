"""inspect: what is in a directory, and what exactly is wrong with a broken one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import change_json, read_tensors, rewrite_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.refusal import refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "hf", dtype="bfloat16", max_shard_size="40KB")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    hf_to_sharded(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_hugging_face(source: Path) -> None:
    found = inspect_directory(source)
    assert (found["format"], found["intact"], found["problems"]) == ("hugging-face", True, [])
    assert found["num_parameters"] == sum(tensor.numel() for tensor in read_tensors(source).values())
    assert found["dtypes"] == {"bfloat16": 21}
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["lm_head.weight"]["shape"] == [131, 48]
    assert by_name["lm_head.weight"]["files"][0].startswith("model-0000")
    for file in found["files"]:
        assert file["sha256"] == hashlib.sha256((source / file["name"]).read_bytes()).hexdigest()
    assert json.loads(json.dumps(found)) == found


def test_sharded(checkpoint: Path) -> None:
    found = inspect_directory(checkpoint)
    assert (found["format"], found["intact"], found["problems"]) == ("sharded", True, [])
    assert (found["step"], found["contains"], found["padded_vocab_size"]) == (0, ["model"], 256)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    fc1 = by_name["decoder.layers.1.mlp.linear_fc1.weight"]
    assert (fc1["shape"], fc1["dtype"], fc1["num_bytes"]) == ([160, 48], "bfloat16", 160 * 48 * 2)
    assert {"hf/config.json", "meta.json", "__0_0.distcp"} <= {file["name"] for file in found["files"]}
    assert json.loads(json.dumps(found)) == found


def test_without_reading_the_files(source: Path) -> None:
    assert not any("sha256" in file for file in inspect_directory(source, hashes=False)["files"])


def test_a_flipped_bit_is_found_by_its_hash(checkpoint: Path) -> None:
    raw = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    raw[50_000] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(raw)
    file, tensor = inspect_directory(checkpoint)["problems"]
    assert file.startswith("manifest: __0_0.distcp has changed")
    assert tensor.endswith(".weight has changed: its SHA-256 is not that of the manifest")


def test_a_cut_off_checkpoint(checkpoint: Path) -> None:
    raw = (checkpoint / "__0_0.distcp").read_bytes()
    (checkpoint / "__0_0.distcp").write_bytes(raw[:-7])
    problems = inspect_directory(checkpoint)["problems"]
    assert problems[0].startswith("__0_0.distcp is cut off")
    (checkpoint / "hf" / "config.json").unlink()
    assert "manifest: hf/config.json is missing" in inspect_directory(checkpoint)["problems"]


def test_broken_hugging_face(source: Path, tmp_path: Path) -> None:
    single = write_tiny_llama(tmp_path / "single")
    tensors = read_tensors(single)
    del tensors["model.norm.weight"]
    rewrite_tensors(single, tensors)
    (problem,) = inspect_directory(single)["problems"]
    assert "missing tensors: model.norm.weight" in problem
    write_tokenizer_model(source)
    (problem,) = inspect_directory(source)["problems"]
    assert "the tokenizer has 400 ids, but the embedding has 131 rows" in problem
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with refused(shard.name, "is truncated"):
        inspect_directory(source)


def test_not_a_model(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("is not a model"):
        inspect_directory(tmp_path / "empty")
    change_json(checkpoint / "meta.json", format="x")
    with refused("meta.json does not say"):
        inspect_directory(checkpoint)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    tensors = read_tensors(source)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    tensors["model.norm.weight"][5] = float("inf")
    rewrite_tensors(source, tensors)
    assert inspect_directory(source)["problems"] == [
        "model.layers.1.mlp.up_proj.weight is not finite: nan at [7, 3]",
        "model.norm.weight is not finite: inf at [5]",
    ]
    assert inspect_directory(source, hashes=False)["intact"]


def test_a_changed_hugging_face_directory_with_a_manifest(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "back")
    assert inspect_directory(tmp_path / "back")["intact"]
    tensors = read_tensors(tmp_path / "back")
    tensors["model.norm.weight"][5] += 1
    rewrite_tensors(tmp_path / "back", tensors)
    problems = inspect_directory(tmp_path / "back")["problems"]
    assert any(problem.startswith("manifest: model.safetensors ha") for problem in problems)
    assert "model.norm.weight has changed: its SHA-256 is not that of the manifest" in problems
    (tmp_path / "back" / "manifest.json").write_text("[]")
    assert "manifest.json cannot be read" in inspect_directory(tmp_path / "back")["problems"][0]
    (tmp_path / "back" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "back" / "manifest.json")
    assert "manifest.json cannot be read" in inspect_directory(tmp_path / "back")["problems"][0]
    said = [difference.message for difference in verify(checkpoint, tmp_path / "back").differences]
    assert any(message.startswith("manifest.json cannot be read") for message in said)
