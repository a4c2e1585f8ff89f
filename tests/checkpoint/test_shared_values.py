"""Small files in which the same values stand many times: read or refused at once, in little memory."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from meditron_train.checkpoint.megatron.source import MegatronSource
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.errors import UserError
from tests.checkpoint.files.payloads import END, old_name, text
from tests.checkpoint.megatron.fixtures import edited, lm_args, write_legacy
from tests.checkpoint.sharded.test_read import write_checkpoint
from tests.checkpoint.test_hostile_pickles import in_a_bin, in_common
from tests.checkpoint.tiny_llama import read_tensors, write_tiny_llama
from tests.hostile import check
from tests.refusal import refused

# 2^60 values, all of them the same few
DEEP: Any = reduce(lambda value, _: (value, value), range(60), ())
WIDE: Any = reduce(lambda value, _: {f"k{i}": value for i in range(100)}, range(8), {})


def at_once(said: str, read: Callable[[], object]) -> None:
    def attempt() -> None:
        with refused(said):
            read()

    check(attempt)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    hf = write_tiny_llama(directory / "hf")
    config = {"rope_theta": 1e4, **json.loads((hf / "config.json").read_text())}
    args = lm_args(config, vocab_size=131)
    return write_legacy(directory / "run", read_tensors(hf), args, style="mcore", padded_vocab_size=256)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"args": {"activation_func": DEEP}}, "activation_func = ((((("),
        ({"args": {"something_else": DEEP}}, "something_else = ((((("),
        ({"args": {"something_else": 10**4400}}, "an integer of"),
        ({"args": {"hidden_size": DEEP}}, "hidden_size = ((((("),
        (
            {"args": {"window_size": (4, 0), "window_attn_skip_freq": [1, 0] * 5000}},
            "skip_freq = [1, 0, 1, 0",
        ),
        ({"model": WIDE}, "more than 200,000 entries"),
        ({"model": {"x" * 10_000: torch.zeros(1)}}, "is no name of a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rank_files(run: Path, place: dict[str, Any], said: str) -> None:
    file = run / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"
    whole = file.read_bytes()
    try:
        with edited(file) as stored:
            for name, value in place.pop("args", {}).items():
                setattr(stored["args"], name, value)
            stored.update(place)
        at_once(said, lambda: MegatronSource(run))
    finally:
        file.write_bytes(whole)


def test_the_iteration_of_a_rank_file_is_a_number(run: Path) -> None:
    file = run / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"
    whole = file.read_bytes()
    assert MegatronSource(run).iteration == 1000
    try:
        with edited(file) as stored:
            stored["iteration"] = DEEP
        assert MegatronSource(run).iteration is None
    finally:
        file.write_bytes(whole)


def repeated(number: int) -> bytes:
    """A list of tensors, each 16 MiB of the one float in its file."""
    storage = b"(" + text("storage") + old_name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\1tQ"
    size = b"J" + struct.pack("<i", 4 << 20) + b"\x85"
    tensor = b"(" + storage + b"K\0" + size + b"K\0\x85\x89}tR"
    return b"](" + (old_name("torch._utils", "_rebuild_tensor_v2") + tensor) * number + b"e" + END


def test_expanded_tensors(tmp_path: Path) -> None:
    read = in_common(tmp_path / "checkpoint", b"")
    with zipfile.ZipFile(tmp_path / "checkpoint" / "common.pt", "w") as archive:
        archive.writestr("archive/data.pkl", repeated(200))
        archive.writestr("archive/data/0", bytes(4))
    at_once("repeat their storages too often", read)


@pytest.mark.parametrize("value", [DEEP, WIDE], ids=["tuples", "dicts"])
def test_values_of_ours_are_no_larger_than_they_look(tmp_path: Path, value: Any) -> None:
    """Whoever walks through what was read comes to its end."""
    at_once(
        "repeat each other more than",
        in_common(tmp_path / "checkpoint", pickle.dumps({"x": value}, protocol=2)),
    )


def test_chunks(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    metadata = read_metadata(checkpoint)
    properties = TensorProperties(dtype=torch.float32)
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))] * 100_000
    entry = TensorStorageMetadata(properties, torch.Size([1]), chunks)
    metadata.state_dict_metadata = {f"x{i}": entry for i in range(20_000)}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    at_once("far more chunks than", lambda: read_metadata(checkpoint))


def test_layers(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    metadata = read_metadata(checkpoint)
    properties = TensorProperties(dtype=torch.float32)
    whole = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([10_000, 1]))]
    entry = TensorStorageMetadata(properties, torch.Size([10_000, 1]), whole)
    metadata.state_dict_metadata |= {f"decoder.layers.x{i}": entry for i in range(500)}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    at_once("more than 200,000 layers", lambda: ShardedSource(checkpoint))


def test_names(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    metadata = read_metadata(checkpoint)
    name = "a.layers." * 100_000 + "\n\n"
    metadata.state_dict_metadata[name] = next(iter(metadata.state_dict_metadata.values()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    at_once("has 900002 characters", lambda: ShardedSource(checkpoint))


def sparse(path: Path, raw: bytes) -> None:
    """The file is 4 TB long, takes no space on the disk, and ends in these bytes."""
    with path.open("wb") as file:
        file.seek((4 << 40) - len(raw))
        file.write(raw)


def test_the_directory_of_a_zip(tmp_path: Path) -> None:
    """Of 4 GB, by what the end of the file says."""
    read = in_a_bin(tmp_path / "model", b"N.")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, (1 << 32) - 2, (1 << 32) - 2, 0)
    sparse(tmp_path / "model" / "pytorch_model.bin", end)
    at_once("the directory of the zip", read)


def test_the_size_of_a_record(tmp_path: Path) -> None:
    """A directory says of a small record that it is compressed to 4 GB."""
    read = in_a_bin(tmp_path / "model", pickle.dumps({}, protocol=2))
    file = tmp_path / "model" / "pytorch_model.bin"
    whole = bytearray(file.read_bytes())
    place = whole.index(b"PK\1\2") + 20
    whole[place : place + 4] = struct.pack("<I", (1 << 32) - 2)
    file.write_bytes(whole)
    tracemalloc.start()
    try:
        with suppress(UserError):
            read()
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("start", "size", "stride"),
    [
        (b"G" + struct.pack(">d", 0.5), b"K\1\x85", b"K\1\x85"),
        (b"K\0", text("1"), b"K\1\x85"),
        (b"K\0", b"K\1\x85", b"]K\1aK\1a"),
        (b"K\0", b"K\0\x8a\x08" + (1 << 62).to_bytes(8, "little") + b"\x86", b"K\1K\1\x86"),
        (b"K\0", b"N", b"N"),
    ],
    ids=["start", "text", "strides", "empty", "none"],
)
def test_tensors_of_no_shape(tmp_path: Path, start: bytes, size: bytes, stride: bytes) -> None:
    storage = b"(" + text("storage") + old_name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\1tQ"
    tensor = (
        old_name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + start
        + size
        + stride
        + b"\x89}tR"
        + END
    )
    read = in_common(tmp_path / "checkpoint", b"")
    with zipfile.ZipFile(tmp_path / "checkpoint" / "common.pt", "w") as archive:
        archive.writestr("archive/data.pkl", tensor)
        archive.writestr("archive/data/0", bytes(64))
    at_once("common.pt cannot be read", read)


@pytest.mark.parametrize("make", ["OrderedDict", "_rebuild_from_type_v2"])
def test_a_tensor_made_by_another_constructor(tmp_path: Path, make: str) -> None:
    rebuild = old_name("torch._tensor", "_rebuild_from_type_v2")
    maker = old_name("collections", "OrderedDict") if make == "OrderedDict" else rebuild
    at_once(
        "made by something else",
        in_common(tmp_path / "checkpoint", rebuild + b"(" + maker + b"N)NtR" + END),
    )
