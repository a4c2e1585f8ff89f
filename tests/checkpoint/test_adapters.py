"""Adapters of PEFT that say too little or the wrong thing, and what lies beside a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from meditron_train.checkpoint.adapters import open_adapter
from meditron_train.checkpoint.convert.adapters import merge_adapter
from tests.checkpoint.tiny_llama import read_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.hostile import check
from tests.long import mostly_long
from tests.refusal import refused

MATRIX = "model.layers.0.self_attn.q_proj.weight"


def write_adapter(directory: Path, base: Path, rank: int = 2, **changes: Any) -> Path:
    directory.mkdir()
    rows, columns = read_tensors(base)[MATRIX].shape
    place = f"base_model.model.{MATRIX.removesuffix('.weight')}"
    factors = {
        f"{place}.lora_A.weight": torch.randn(rank, columns),
        f"{place}.lora_B.weight": torch.randn(rows, rank),
    }
    save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "hf", vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r 0 and"),
        ({"r": -1}, "r -1 and"),
        ({"r": "2"}, "r '2' and"),
        ({"r": True}, "r True and"),
        ({"r": float("inf")}, "r inf and"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": 10**400}, "lora_alpha an integer of 1329 bits"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": [1] * 10_000}, "lora_alpha [1, 1"),
        ({"peft_type": ["x"] * 10_000}, "of the type ['x', 'x'"),
        ({"bias": ["x"] * 10_000}, "bias is ['x', 'x'"),
        ({"r": 4}, "says rank 4, but"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_or_alpha_that_is_none_is_refused(
    tmp_path: Path, base: Path, changes: dict[str, Any], said: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **changes)
    with refused("adapter_config.json", said) if "peft_type" not in changes else refused(said):
        open_adapter(adapter)
    check(lambda: open_adapter(adapter))


def test_the_rank_of_every_matrix_is_compared(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    other = write_adapter(tmp_path / "other", base, rank=3)
    more = {name.replace("q_proj", "o_proj"): tensor for name, tensor in read_tensors(other).items()}
    save_file({**read_tensors(adapter), **more}, adapter / "adapter_model.safetensors")
    with refused("says rank 2, but", "o_proj"):
        open_adapter(adapter)


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("settings", mostly_long(["base", "adapter", "neither"], "adapter", "neither"))
def test_generation_settings(tmp_path: Path, with_tokenizer: bool, settings: str) -> None:
    base = write_tokenizer_model(write_tiny_llama(tmp_path / "base", vocab_size=VOCAB_SIZE))
    adapter = write_adapter(tmp_path / "adapter", base)
    if with_tokenizer:
        write_tokenizer_model(adapter)
    (base / "generation_config.json").unlink(missing_ok=True)
    if settings != "neither":
        (base / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [2, 7], "temperature": 0.25})
        )
    if settings == "adapter":
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    merge_adapter(base, adapter, tmp_path / "merged")
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    if settings == "neither":
        assert "temperature" not in found
    else:
        source = adapter if settings == "adapter" and with_tokenizer else base
        assert found == json.loads((source / "generation_config.json").read_text())
