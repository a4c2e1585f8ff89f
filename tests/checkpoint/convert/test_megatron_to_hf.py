"""From checkpoints of Megatron-LM and Megatron-LLM to Hugging Face: to the byte, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.cli.main import app
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.megatron.fixtures import edited, llm_args, lm_args, write_legacy
from tests.checkpoint.megatron.test_rank_files import make_hf
from tests.checkpoint.tiny_llama import assert_same_bits, change_json, read_tensors
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model

NAMED = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "rms_norm_eps": 1e-5}


def convert(*arguments: Any) -> Any:
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def original(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """A tiny Llama in bf16 with its tokenizer: directory, tensors, config."""
    directory = tmp_path / "original"
    tensors, config = make_hf(directory, vocab_size=VOCAB_SIZE, dtype="bfloat16", **NAMED)
    write_tokenizer_model(directory)
    return directory, tensors, config


@pytest.mark.parametrize("style", ["megatron-llm", "mcore-te"])
def test_the_whole_way(tmp_path: Path, original: Any, style: str) -> None:
    directory, tensors, config = original
    args = (llm_args if "llm" in style else lm_args)(config)
    run = write_legacy(tmp_path / "run", tensors, args, style=style, tp=2, pp=2, padded_vocab_size=640)
    back = tmp_path / "back"
    done = convert("megatron-to-hf", run, back, "--tokenizer", directory)
    assert done.exit_code == 0, done.output
    got = read_tensors(back)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(got[name], tensor, name)
    # Both ways round: another program's checkpoint may be either side.
    for a, b in ((directory, back), (run, back), (back, run), (run, directory)):
        assert verify(a, b).differences == ()
    assert verify(run, back, logits=True).differences == ()
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "manifest.json"):
        assert (back / name).is_file()
    described = inspect_directory(run)
    assert described["intact"] and described["format"] == "megatron"
    assert described["layout"] == {"tensor": 2, "pipeline": 2} and described["padded_vocab_size"] == 640


def test_special_ids_are_those_of_the_config_beside_the_tokenizer(tmp_path: Path, original: Any) -> None:
    """The arguments do not say them. What the original's config.json says counts, not that its tokenizer can pad."""
    directory, tensors, config = original
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    run = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", padded_vocab_size=640)
    for number, stated in enumerate(({"pad_token_id": None}, {"pad_token_id": 0, "eos_token_id": [2, 5]})):
        change_json(directory / "config.json", **stated)
        back = tmp_path / f"back{number}"
        done = convert("megatron-to-hf", run, back, "--tokenizer", directory)
        assert done.exit_code == 0, done.output
        written = json.loads((back / "config.json").read_text())
        assert {key: written[key] for key in stated} == stated
        assert verify(back, directory).differences == ()
    change_json(directory / "config.json", eos_token_id=[2, "x"])
    done = convert("megatron-to-hf", run, tmp_path / "wrong", "--tokenizer", directory)
    assert done.exit_code == 2 and "config.json: eos_token_id" in done.stderr
    (directory / "config.json").unlink()
    done = convert("megatron-to-hf", run, tmp_path / "alone", "--tokenizer", directory)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "alone/config.json").read_text())
    # transformers would not train the embedding of a token that ends texts if it were the padding, too
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, None]


def test_a_changed_weight_and_a_changed_theta_are_named(tmp_path: Path, original: Any) -> None:
    directory, tensors, config = original
    run = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", tp=2, padded_vocab_size=640)
    with edited(run / "iter_0001000/mp_rank_01/model_optim_rng.pt") as content:
        content["model"]["decoder.layers.2.mlp.linear_fc2.weight"][3, 5] += 1
    with edited(run / "iter_0001000/mp_rank_00/model_optim_rng.pt") as content:
        content["args"].rotary_base = 500000
    found = {(d.kind, d.name) for d in verify(run, directory).differences}
    assert found == {("tensor", "model.layers.2.mlp.down_proj.weight"), ("config", "rope.theta")}


def test_without_a_tokenizer(tmp_path: Path, original: Any) -> None:
    _, tensors, config = original
    run = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", padded_vocab_size=640)
    done = convert("megatron-to-hf", run, tmp_path / "back")
    assert done.exit_code == 2 and "Give --vocab-size N or --tokenizer DIR" in done.stderr
    assert not (tmp_path / "back").exists()
    done = convert("megatron-to-hf", run, tmp_path / "back", "--vocab-size", VOCAB_SIZE)
    assert done.exit_code == 0 and "No tokenizer was given" in done.stderr
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == VOCAB_SIZE
    write_tokenizer_model(run)  # where Megatron-LLM's own converter puts it
    done = convert("megatron-to-hf", run, tmp_path / "with")
    assert done.exit_code == 0 and (tmp_path / "with/tokenizer.json").is_file()


def test_options_of_other_programs_checkpoints_are_only_for_those(tmp_path: Path, original: Any) -> None:
    directory, tensors, config = original
    done = convert("megatron-to-hf", directory, tmp_path / "back", "--vocab-size", 131)
    assert "is not a checkpoint of Megatron-LM or Megatron-LLM" in done.stderr
    run = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", padded_vocab_size=640)
    done = convert("megatron-to-hf", run, tmp_path / "back", "--rotary", "backwards")
    assert "Write auto, half or interleaved" in done.stderr


def test_nan_is_refused_by_name(tmp_path: Path, original: Any) -> None:
    directory, tensors, config = original
    run = write_legacy(tmp_path / "run", tensors, lm_args(config), style="mcore", padded_vocab_size=640)
    with edited(run / "iter_0001000/mp_rank_00/model_optim_rng.pt") as content:
        content["model"]["decoder.layers.1.self_attention.linear_proj.weight"][0, 0] = float("nan")
    done = convert("megatron-to-hf", run, tmp_path / "back", "--tokenizer", directory)
    assert "model.layers.1.self_attn.o_proj.weight (nan at [0, 0])" in done.stderr
    assert not (tmp_path / "back").exists()
