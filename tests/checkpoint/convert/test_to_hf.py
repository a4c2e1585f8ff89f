"""export_hf: the Hugging Face directory that comes out of a sharded checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.convert.engine import Limits
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.dtypes import common_dtype, parse_dtype
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.hf.directory import write_hf_files
from meditron_train.checkpoint.manifest import write_manifest
from meditron_train.errors import MeditronError
from tests.checkpoint.sharded.test_read import write_checkpoint
from tests.checkpoint.test_tensor_map import make_model, random_source
from tests.checkpoint.tiny_llama import assert_same_bits, read_tensors
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.refusal import refused


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    write_manifest(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_tensors_config_and_progress(checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = defaultdict(int)

    def progress(name: str, num_bytes: int, total: int) -> None:
        seen[name] += num_bytes
        assert sum(seen.values()) <= total

    export_hf(checkpoint, tmp_path / "hf", progress=progress)
    want = random_source(make_model(), torch.bfloat16).tensors
    got = read_tensors(tmp_path / "hf")
    assert got.keys() == want.keys() == seen.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)
        assert seen[name] == tensor.numel() * 2
    assert read_hf_config(tmp_path / "hf") == make_model().model_copy(update={"dtype": "bfloat16"})
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert "eos_token_id" not in generation  # the model has none


def test_dtype_and_shard_size(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "hf", dtype="fp32", max_shard_size="20KB")
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1
    assert all(path.stat().st_size < 25_000 for path in files)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "hf").values()} == {torch.float32}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_what_lies_beside_the_weights_is_carried(checkpoint: Path, tmp_path: Path) -> None:
    """As far as it fits: 131 rows are too few for this tokenizer, 420 enough."""
    write_tokenizer_model(checkpoint / "hf")
    with refused("tokenizer has 400 ids", "131 rows"):
        export_hf(checkpoint, tmp_path / "hf")
    (checkpoint / "hf" / "tokenizer.model").unlink()
    (checkpoint / "hf" / "generation_config.json").write_text('{"temperature": 0.6}')
    write_manifest(checkpoint)
    export_hf(checkpoint, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_refusals_leave_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    with refused("dtype 'int8' is unknown", "bf16, fp16, fp32, keep"):
        export_hf(checkpoint, target, dtype="int8")
    with refused("'big' is not a size"):
        export_hf(checkpoint, target, max_shard_size="big")
    with refused("--max-ram is 1000 bytes", "MiB or more"):
        export_hf(checkpoint, target, limits=Limits(max_ram_num_bytes=1000))
    with refused("not a finished checkpoint"):
        export_hf(tmp_path, target)
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(b"\0" * data.stat().st_size)
    with refused("__0_0.distcp has changed"):
        export_hf(checkpoint, target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    target.mkdir()
    (target / "thesis.txt").touch()
    with refused("exists and is not empty"):
        export_hf(checkpoint, target)


def test_a_flipped_bit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    raw = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    raw[len(raw) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(raw)
    with refused("not an intact checkpoint:\n  __0_0.distcp has changed: SHA-256"):
        export_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_without_its_manifest_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    with refused("not an intact checkpoint:\n  manifest.json is missing"):
        export_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("text", "said"), [("{'do_sample'", "not valid JSON"), ("[]", "must hold a JSON object")]
)
def test_a_damaged_generation_config(checkpoint: Path, tmp_path: Path, text: str, said: str) -> None:
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "generation_config.json").write_text(text)
    write_manifest(checkpoint)
    with refused("generation_config.json", said):
        export_hf(checkpoint, tmp_path / "new")
    (tmp_path / "beside").mkdir()
    with refused("generation_config.json", said):
        write_hf_files(tmp_path / "beside", make_model(), checkpoint / "hf")
    assert list((tmp_path / "beside").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_disk_full(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meditron_train.checkpoint.files.direct_file.os.fsync", fsync)
    with refused("no space left on the disk", kind=MeditronError):
        export_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_small_helpers() -> None:
    assert parse_dtype("keep") is parse_dtype(None) is None
    assert parse_dtype("bf16") is torch.bfloat16
    assert common_dtype([torch.float32, torch.bfloat16, torch.bfloat16]) == "bfloat16"
