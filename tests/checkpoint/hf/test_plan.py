"""Safetensors plans: files as transformers and safetensors read them, shards of the size asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from meditron_train.checkpoint.hf.plan import INDEX_NAME, plan_safetensors, safetensors_index
from meditron_train.units import format_num_bytes, parse_num_bytes
from tests.checkpoint.planned import planned, write_planned
from tests.checkpoint.tiny_llama import assert_same_bits, read_tensors
from tests.refusal import refused

TENSORS = {
    "a": torch.randn(5, 7).bfloat16(),
    "b": torch.randn(3, 3),
    "c": torch.arange(11, dtype=torch.uint8),
    "d": torch.tensor([2.5]),
}


def test_one_file(tmp_path: Path) -> None:
    files = plan_safetensors(planned(TENSORS))
    write_planned(tmp_path, files, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert safetensors_index(files) is None
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert_same_bits(loaded[name], tensor, name)


def test_shards_and_index(tmp_path: Path) -> None:
    plans = plan_safetensors(planned(TENSORS), max_shard_num_bytes=50)
    write_planned(tmp_path, plans, TENSORS)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads(safetensors_index(plans) or "")
    assert INDEX_NAME == "model.safetensors.index.json"
    assert index["metadata"] == {"total_parameters": 35 + 9 + 11 + 1, "total_size": 70 + 36 + 11 + 4}
    assert index["weight_map"] == {"a": files[0], "b": files[1], "c": files[1], "d": files[2]}
    for name, tensor in read_tensors(tmp_path).items():
        assert_same_bits(tensor, TENSORS[name], name)


def test_casts_to_the_planned_dtype(tmp_path: Path) -> None:
    tensors = {"b": TENSORS["b"]}
    write_planned(tmp_path, plan_safetensors(planned(tensors, torch.bfloat16)), tensors)
    assert_same_bits(load_file(tmp_path / "model.safetensors")["b"], TENSORS["b"].bfloat16())


def test_sizes() -> None:
    assert parse_num_bytes("5GB") == 5 * 10**9
    assert parse_num_bytes("4GiB") == 4 * 2**30
    assert parse_num_bytes("1.5 mb") == 1_500_000
    assert parse_num_bytes(123) == 123
    assert parse_num_bytes("2TB") == 2 * 10**12
    assert parse_num_bytes("0.5 TiB") == 2**39
    for text in ("five", "5 PB", "-1GB", "0", ""):
        with refused(f"{text!r} is not a size", "5GB"):
            parse_num_bytes(text)


def test_sizes_for_people() -> None:
    sizes = (0, 1023, 1024, 5 * 2**20, 3 * 2**29, 2**41)
    assert [format_num_bytes(size) for size in sizes] == [
        "0 bytes", "1023 bytes", "1.00 KiB", "5.00 MiB", "1.50 GiB", "2.00 TiB",
    ]  # fmt: skip
