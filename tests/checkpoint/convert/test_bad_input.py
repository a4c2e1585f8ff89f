"""What is wrong with the input is said by name, nothing is written, and a full disk is survived."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.convert.engine import Limits
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.to_rank_files import reshard
from meditron_train.checkpoint.files.stored import ReadError, byte_view
from meditron_train.checkpoint.sharded import plan as sharded_plan
from meditron_train.errors import MeditronError
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import change_json, read_tensors, rewrite_tensors, write_tiny_llama
from tests.refusal import refused

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "source", dtype="bfloat16")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "shards", dtype="bfloat16", max_shard_size="40KB")


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def second_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def change_index(directory: Path, **weight_map: str) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change_json(path, weight_map={**index["weight_map"], **weight_map})


def as_bin(directory: Path, value: Any) -> None:
    (second_shard(directory)).unlink()
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save(value, directory / "pytorch_model.bin")


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing-shard": (lambda d: second_shard(d).unlink(), "missing model-00002-of-"),
    "header-with-another-shape": (
        lambda d: change_header(second_shard(d), lambda h: first_tensor(h).update(shape=[9999])),
        "model-00002-of-00004.safetensors: the header says",
    ),
    "header-beyond-the-file": (
        lambda d: change_header(
            second_shard(d), lambda h: first_tensor(h).update(shape=[1 << 30], data_offsets=[0, 1 << 31])
        ),
        "is truncated",
    ),
    "truncated": (
        lambda d: second_shard(d).write_bytes(second_shard(d).read_bytes()[:-1]),
        "model-00002-of-00004.safetensors is truncated",
    ),
    "absent-tensor": (
        lambda d: change_index(d, made_up=second_shard(d).name),
        "names tensors that its files do not hold: made_up",
    ),
    "path-traversal": (lambda d: change_index(d, made_up="../x.safetensors"), "outside the directory"),
    "absolute-path": (lambda d: change_index(d, made_up="/etc/passwd"), "outside the directory"),
    "pickle-with-code": (
        lambda d: as_bin(d, {UP: torch.zeros(1), "x": Malicious()}),
        "Refused, as it could run code",
    ),
    "not-a-model": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no-weights": (lambda d: [path.unlink() for path in d.glob("*.safetensors*")], "holds no weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(shards: Path, tmp_path: Path, case: str, monkeypatch) -> None:
    """Conversion, verify and inspect refuse them with the same words, whichever side it is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, tmp_path / "good")
    spoil, said = BROKEN[case]
    spoil(shards)
    with refused(said):
        hf_to_sharded(shards, tmp_path / "target")
    with refused(said):
        inspect_directory(shards)
    with refused(said):
        verify(tmp_path / "good", shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "shards"]


def test_a_bare_pickle_with_code(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with refused("pytorch_model.bin"):
        hf_to_sharded(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "lora-left-in": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 48)}),
        "LoRA weights left in",
    ),
    "extra": (lambda t: t.update({"score.weight": torch.zeros(2)}), "score.weight"),
    "wrong-shape": (
        lambda t: t.update({UP: t[UP][:40]}),
        f"{UP} has shape [40, 48], the config says [80, 48]",
    ),
    "missing": (lambda t: t.pop(UP), f"missing tensors: {UP}"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_the_config(source: Path, tmp_path: Path, case: str) -> None:
    change, said = TENSORS[case]
    tensors = read_tensors(source)
    change(tensors)
    rewrite_tensors(source, tensors)
    with refused(said):
        hf_to_sharded(source, tmp_path / "target")
    description = inspect_directory(source)
    assert not description["intact"] and said in description["problems"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(source: Path, tmp_path: Path, value: float) -> None:
    tensors = read_tensors(source)
    tensors[UP][7, 3] = value
    rewrite_tensors(source, tensors)
    with refused("not finite", f"{UP} ({value} at [7, 3])", "--allow-nonfinite"):
        hf_to_sharded(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    hf_to_sharded(source, tmp_path / "checkpoint", limits=Limits(allow_nonfinite=True))
    with refused("not finite", UP):
        export_hf(tmp_path / "checkpoint", tmp_path / "back")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", limits=Limits(allow_nonfinite=True))
    assert verify(source, tmp_path / "back").differences == ()
    assert inspect_directory(tmp_path / "back")["problems"] == [f"{UP} is not finite: {value} at [7, 3]"]


def test_no_space_is_seen_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch) -> None:
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type(free)(free.total, free.used, 1000))
    with refused("1000 bytes free", "would be written", kind=MeditronError):
        hf_to_sharded(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_disk_that_fills_up_is_survived(source: Path, tmp_path: Path, direction: str, monkeypatch) -> None:
    hf_to_sharded(source, tmp_path / "checkpoint")
    before = {path.name for path in tmp_path.iterdir()}
    posix_fsync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        posix_fsync(descriptor)

    convert: Callable[[], None] = {
        "to": lambda: hf_to_sharded(source, tmp_path / "target"),
        "from": lambda: export_hf(tmp_path / "checkpoint", tmp_path / "target"),
    }[direction]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with refused("no space left on the disk", "target", kind=MeditronError):
            convert()
    assert {path.name for path in tmp_path.iterdir()} == before
    convert()
    assert verify(source, tmp_path / "target").differences == ()


def test_the_output_is_not_empty(source: Path, tmp_path: Path) -> None:
    hf_to_sharded(source, tmp_path / "checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with refused("full exists and is not empty"):
        hf_to_sharded(source, tmp_path / "full")
    with refused("full exists and is not empty"):
        export_hf(tmp_path / "checkpoint", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_links_as_the_hub_cache_makes_them(shards: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/HASH"""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "r", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(shards.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    hf_to_sharded(snapshot, tmp_path / "checkpoint")
    assert verify(snapshot, tmp_path / "checkpoint").differences == ()
    assert inspect_directory(snapshot)["intact"]


def test_links_from_a_directory_to_itself(source: Path, tmp_path: Path) -> None:
    for name in ("latest", "best"):
        (source / name).symlink_to(".")
    hf_to_sharded(source, tmp_path / "checkpoint")


@pytest.mark.parametrize("stored", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_weights_that_are_no_floats(source: Path, tmp_path: Path, stored: torch.dtype) -> None:
    tensors = read_tensors(source)
    tensors[UP] = (tensors[UP] * 100).to(stored)
    rewrite_tensors(source, tensors)
    for dtype in (None, "fp32"):
        with refused(f"{UP} is", "only floating-point weights"):
            hf_to_sharded(source, tmp_path / "target", dtype=dtype)


def test_double_precision_needs_a_dtype(source: Path, tmp_path: Path) -> None:
    rewrite_tensors(source, {name: tensor.double() for name, tensor in read_tensors(source).items()})
    with refused("model.embed_tokens.weight is float64: choose bf16, fp16 or fp32 with --dtype"):
        hf_to_sharded(source, tmp_path / "target")
    hf_to_sharded(source, tmp_path / "target", dtype="fp32")
    export_hf(tmp_path / "target", tmp_path / "back")
    assert verify(source, tmp_path / "target").differences == ()


def test_an_output_inside_the_source(source: Path, tmp_path: Path) -> None:
    hf_to_sharded(source, tmp_path / "checkpoint")
    with refused("lies inside"):
        hf_to_sharded(source, source / "megatron")
    with refused("lies inside"):
        export_hf(tmp_path / "checkpoint", tmp_path / "checkpoint" / "back")
    with refused("lies inside"):
        reshard(tmp_path / "checkpoint", tmp_path / "checkpoint" / "ranks", tp=1, pp=1)
    assert inspect_directory(tmp_path / "checkpoint")["intact"]


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_disk_that_cannot_be_read_is_survived(
    source: Path, tmp_path: Path, direction: str, monkeypatch
) -> None:
    """The message names the source; what is finished stays, and the same command completes it."""
    monkeypatch.setattr(sharded_plan, "_MAX_FILE_BYTES", 30_000)
    hf_to_sharded(source, tmp_path / "checkpoint")
    convert: Callable[[], None] = {
        "to": lambda: hf_to_sharded(source, tmp_path / "target"),
        "from": lambda: export_hf(tmp_path / "checkpoint", tmp_path / "target", max_shard_size="30KB"),
    }[direction]
    preadv, calls = os.preadv, []

    def fail(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 16:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", fail)
        with refused("source" if direction == "to" else "checkpoint", "Input/output error", kind=ReadError):
            convert()
    assert any((tmp_path / "target.tmp").glob("model*" if direction == "from" else "*.distcp"))
    convert()
    assert verify(source, tmp_path / "target").differences == ()
    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", fail)
        problems = inspect_directory(source)["problems"]
        assert len(problems) == 21 and "cannot be read (Input/output error)" in problems[0]
        different = verify(source, tmp_path / "target").differences
    assert {difference.message.partition(":")[0] for difference in different} == {"A"}


def test_the_source_is_held_to_its_own_manifest(source: Path, tmp_path: Path) -> None:
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    raw = bytearray((tmp_path / "back" / "model.safetensors").read_bytes())
    raw[-1001] ^= 1
    (tmp_path / "back" / "model.safetensors").write_bytes(raw)
    with refused("has changed since the checkpoint was written"):
        hf_to_sharded(tmp_path / "back", tmp_path / "again")


def test_a_tensor_without_a_hash_in_the_manifest(source: Path, tmp_path: Path) -> None:
    """Its file is hashed as a whole, then."""
    hf_to_sharded(source, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes(byte_view(read_tensors(source)[UP].contiguous()))) + 1001] ^= 1
    path.write_bytes(raw)
    manifest = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())
    del manifest["tensors"][UP]
    change_json(tmp_path / "checkpoint" / "manifest.json", **manifest)
    with refused("__0_0.distcp has changed"):
        export_hf(tmp_path / "checkpoint", tmp_path / "back")
