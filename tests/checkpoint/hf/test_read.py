"""HFSource reads what safetensors and torch read, slice by slice, and names what is wrong with a damaged directory."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from meditron_train.checkpoint.files.stored import ReadError
from meditron_train.checkpoint.hf.read import HFSource, is_hf_directory, open_hf_model
from meditron_train.errors import UserError
from tests.checkpoint.tiny_llama import (
    assert_same_bits,
    change_json,
    read_tensors,
    rewrite_tensors,
    write_tiny_llama,
)
from tests.refusal import refused

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "sharded", max_shard_size="50KB", dtype="bfloat16")


def write_bin(directory: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, directory / "pytorch_model.bin", **options)
    return directory


def test_reads_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
    tensors = {f"t{i}": (torch.randn(5, 7) * 50).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(3.5), "vector": torch.arange(4.0), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = HFSource(tmp_path)
    assert sorted(source.names) == sorted(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
        assert_same_bits(source.read(name), tensor, name)
    assert_same_bits(source.read("t1", rows=(1, 4)), tensors["t1"][1:4])
    assert_same_bits(source.read("t1", columns=(2, 5)), tensors["t1"][:, 2:5])
    assert_same_bits(source.read("t0", rows=(3, 5), columns=(0, 1)), tensors["t0"][3:5, :1])


def test_column_slices_larger_than_a_block(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("meditron_train.checkpoint.files.stored._BLOCK_BYTES", 100)
    weight = torch.randn(33, 10)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same_bits(HFSource(tmp_path).read("w", rows=(1, 33), columns=(3, 9)), weight[1:, 3:9])


def test_only_what_is_read_once_leaves_the_page_cache(sharded: Path, monkeypatch) -> None:
    """The ranks of a node all read the same model: it must stay there for them."""
    dropped: list[int] = []
    monkeypatch.setattr("os.posix_fadvise", lambda descriptor, start, size, advice: dropped.append(size))
    for name, tensor in read_tensors(sharded).items():
        assert_same_bits(open_hf_model(sharded)[1].read(name), tensor, name)
        assert not dropped
        assert_same_bits(open_hf_model(sharded, read_once=True)[1].read(name), tensor, name)
        assert dropped == [tensor.numel() * tensor.itemsize]
        dropped.clear()


def test_opens_a_sharded_model(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model, source = open_hf_model(sharded)
    assert model.dtype == "bfloat16" and model.vocab_size == 131
    for name, tensor in read_tensors(sharded).items():
        assert_same_bits(source.read(name), tensor, name)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_bin_files(tmp_path: Path, legacy: bool) -> None:
    tensors = {"a": torch.randn(6, 4).bfloat16(), "b": torch.randn(3)}
    source = HFSource(write_bin(tmp_path / "model", tensors, _use_new_zipfile_serialization=not legacy))
    assert_same_bits(source.read("a", rows=(2, 5), columns=(1, 3)), tensors["a"][2:5, 1:3])
    assert source.shape("b") == (3,) and source.dtype("a") == torch.bfloat16


def test_reads_sharded_bin_files(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(3)}
    index = {}
    for number, name in enumerate(tensors, start=1):
        index[name] = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name]}, tmp_path / index[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = HFSource(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_follows_links_as_the_hub_cache_makes_them(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    _, source = open_hf_model(tmp_path)
    assert_same_bits(source.read("model.norm.weight"), read_tensors(tiny)["model.norm.weight"])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="model.safetensors is a link to a file that does not exist"):
        open_hf_model(tmp_path)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"missing {shard.name}"):
        open_hf_model(sharded)


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is truncated: .* ends at byte"):
        open_hf_model(sharded)
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{shard.name} is not a safetensors file, or its header is cut off"):
        open_hf_model(sharded)
    shard.write_bytes(b"123")
    with pytest.raises(UserError, match=f"{shard.name} is only 3 bytes"):
        open_hf_model(sharded)


def test_header_that_lies(copy: Path) -> None:
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])

    def write(changed: dict) -> None:
        text = json.dumps({**header, **changed}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    entry = header["model.norm.weight"]
    write({"model.norm.weight": {**entry, "shape": [999]}})
    with pytest.raises(UserError, match=r"the header says model.norm.weight is F32 \[999\]"):
        open_hf_model(copy)
    write({"model.norm.weight": {**entry, "dtype": "F8_E4M3"}})
    with pytest.raises(UserError, match="model.norm.weight has dtype F8_E4M3; quantized"):
        open_hf_model(copy)
    write({"model.norm.weight": {"shape": [48]}})
    with pytest.raises(UserError, match="entry of model.norm.weight is malformed"):
        open_hf_model(copy)
    path.write_bytes(struct.pack("<Q", 8) + b"not json" + raw)
    with pytest.raises(UserError, match="not valid JSON"):
        open_hf_model(copy)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        open_hf_model(copy)


def test_index_names_absent_tensors(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.made_up.weight"] = sorted(index["weight_map"].values())[0]
    path.write_text(json.dumps(index))
    with pytest.raises(
        UserError, match="index names tensors that its files do not hold: model.layers.9.made_up.weight"
    ):
        open_hf_model(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"])
def test_index_that_leaves_the_directory(sharded: Path, file: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(UserError, match="model.norm.weight points to .* outside the directory"):
        HFSource(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        HFSource(sharded)


def test_missing_extra_and_wrong_tensors(copy: Path) -> None:
    tensors = read_tensors(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(7)
    rewrite_tensors(copy, tensors)
    with pytest.raises(UserError) as error:
        open_hf_model(copy)
    for part in (
        str(copy),
        "missing tensors: model.layers.1.mlp.up_proj.weight",
        "lora_A",
        "model.norm.weight has shape [7]",
    ):
        assert part in str(error.value)


def test_config_of_another_size(copy: Path) -> None:
    change_json(copy / "config.json", vocab_size=140)
    with pytest.raises(
        UserError, match=r"embed_tokens.weight has shape \[131, 48\], the config says \[140, 48\]"
    ):
        open_hf_model(copy)


def test_no_weights(tmp_path: Path) -> None:
    assert not is_hf_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert is_hf_directory(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        HFSource(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no .*index.json"):
        HFSource(tmp_path)


def test_unknown_tensor_is_named(tiny: Path) -> None:
    with pytest.raises(UserError, match="no tensor model.nothing.weight"):
        HFSource(tiny).read("model.nothing.weight")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    directory = write_bin(tmp_path / "model", {"a": torch.zeros(1), "b": Malicious()})
    with pytest.raises(UserError, match="pytorch_model.bin: .*Refused"):
        HFSource(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="pytorch_model.bin"):
        HFSource(directory)
    assert not marker.exists()


def test_damaged_bin(tmp_path: Path) -> None:
    directory = write_bin(tmp_path / "model", {"a": torch.randn(100, 100)})
    path = directory / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read"):
        HFSource(directory)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="does not hold a state dict, but a list"):
        HFSource(directory)


UP, GATE = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
LIES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "another's-bytes": (lambda h: h[UP].update(data_offsets=h[GATE]["data_offsets"]), "overlaps"),
    "shifted": (lambda h: h[UP].update(data_offsets=[x - 2 for x in h[UP]["data_offsets"]]), "overlaps"),
    "gap": (lambda h: h.pop(UP), "does not begin at the end of"),
    "offsets-text": (lambda h: h[UP].update(data_offsets=["a", 5]), f"{UP} is malformed"),
    "offsets-floats": (lambda h: h[UP].update(data_offsets=[0.0, 15360.0]), f"{UP} is malformed"),
    "offsets-null": (lambda h: h[UP].update(data_offsets=[None, 5]), f"{UP} is malformed"),
    "offsets-one": (lambda h: h[UP].update(data_offsets=[5]), f"{UP} is malformed"),
    "dtype-list": (lambda h: h[UP].update(dtype=["F32"]), f"{UP} is malformed"),
    "entry-list": (lambda h: h.update({UP: [1]}), f"{UP} is malformed"),
    "shape-text": (lambda h: h[UP].update(shape=["80", "48"]), f"{UP} is malformed"),
    "shape-floats": (lambda h: h[UP].update(shape=[80.0, 48.0]), f"{UP} is malformed"),
    "shape-null": (lambda h: h[UP].update(shape=None), f"{UP} is malformed"),
    "shape-negative": (lambda h: h[UP].update(shape=[-80, -48]), f"the header says {UP} is F32"),
    "list": (lambda h: b"[1]", "not a JSON object"),
    "deep": (lambda h: b'{"a":' + b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_the_format_forbids(copy: Path, case: str) -> None:
    change, said = LIES[case]
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with refused("model.safetensors", said):
        open_hf_model(copy)


def test_bytes_that_belong_to_no_tensor(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    with refused("model.safetensors: 100 bytes after the last tensor"):
        open_hf_model(copy)


def test_a_disk_that_cannot_be_read(copy: Path, monkeypatch) -> None:
    def preadv(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    source = HFSource(copy)
    monkeypatch.setattr("os.preadv", preadv)
    with refused(
        "model.safetensors", "model.norm.weight cannot be read (Input/output error)", kind=ReadError
    ):
        source.read("model.norm.weight")
