"""One answer to what model.from and data.special_tokens make of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.config.load import load_config
from meditron_train.flows.plan import model_shape
from meditron_train.train.base_model import resolve_base_model, tokenizer_size
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.refusal import refused


def config_of(tmp_path: Path, from_: Path, special_tokens: list[str]) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{from: {from_}}}\n"
        f"data: {{tokenizer: {tmp_path / 'tokenizer'}, train: [{{name: a, path: {tmp_path / 'a'}}}]}}\n"
    )
    return load_config(path, [f"data.special_tokens={special_tokens}"])


def test_only_special_tokens_that_the_tokenizer_does_not_have_are_new(tmp_path: Path) -> None:
    hf = write_tiny_llama(tmp_path / "hf", vocab_size=VOCAB_SIZE)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer_model(tmp_path / "tokenizer")
    config = config_of(tmp_path, hf, ["<unk>", "<|new|>"])
    base = resolve_base_model(config)
    assert base is not None
    assert (base.model.vocab_size, base.num_new_tokens) == (VOCAB_SIZE + 1, 1)
    assert tokenizer_size(config) == VOCAB_SIZE + 1
    assert model_shape(config, []) == base.model


def test_a_model_with_room_does_not_grow(tmp_path: Path) -> None:
    hf = write_tiny_llama(tmp_path / "hf", vocab_size=VOCAB_SIZE + 8)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer_model(tmp_path / "tokenizer")
    base = resolve_base_model(config_of(tmp_path, hf, ["<|new|>"]))
    assert base is not None and (base.num_new_tokens, base.model.vocab_size) == (0, VOCAB_SIZE + 8)


def test_without_the_tokenizer_all_of_them_count(tmp_path: Path) -> None:
    base = resolve_base_model(config_of(tmp_path, write_tiny_llama(tmp_path / "hf"), ["<unk>", "<|new|>"]))
    assert base is not None and (base.num_new_tokens, base.model.vocab_size) == (2, 133)


def test_a_sharded_checkpoint_does_not_grow_and_what_is_no_model_is_none(tmp_path: Path) -> None:
    hf_to_sharded(write_tiny_llama(tmp_path / "hf"), tmp_path / "checkpoint")
    base = resolve_base_model(config_of(tmp_path, tmp_path / "checkpoint", []))
    assert base is not None and base.model.vocab_size == 131
    with refused("data.special_tokens add 1 rows", "convert megatron-to-hf"):
        resolve_base_model(config_of(tmp_path, tmp_path / "checkpoint", ["<|new|>"]))
    for nothing in (tmp_path / "nowhere", tmp_path):
        assert resolve_base_model(config_of(tmp_path, nothing, [])) is None
