"""verify: equal models are equal in any format, and every planted corruption is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.verify.compare_tensors import BitComparison
from meditron_train.verify.verify import Comparison, verify
from tests.checkpoint.tiny_llama import change_json, read_tensors, rewrite_tensors, write_tiny_llama
from tests.long import mostly_long
from tests.refusal import refused

UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def named(result: Comparison) -> dict[str, str]:
    return {difference.name: difference.message for difference in result.differences}


def spoil(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = read_tensors(directory)
    change(tensors)
    rewrite_tensors(directory, tensors)


def test_equal_in_any_format(models: Path) -> None:
    seen: dict[str, int] = {}
    for a in ("hf", "checkpoint", "back"):
        for b in ("hf", "checkpoint", "back"):
            result = verify(
                models / a, models / b, progress=lambda name, num, total: seen.setdefault(name, num)
            )
            assert result.differences == ()
            assert result.num_tensors == len(seen) == 21


def test_a_single_flipped_bit_in_safetensors(models: Path, back: Path) -> None:
    path = back / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header_size = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + header_size])[UP]["data_offsets"]
    raw[8 + header_size + start + 2 * (48 * 3 + 7)] ^= 1  # row 3, column 7, lowest mantissa bit
    path.write_bytes(raw)
    for other in ("hf", "checkpoint"):
        differences = named(verify(models / other, back))
        assert list(differences) == [UP]
        assert "1 of 3840 elements differ, first at [3, 7]:" in differences[UP]
        assert "max |Δ|" in differences[UP]


def test_a_single_flipped_bit_in_a_sharded_checkpoint(models: Path, tmp_path: Path) -> None:
    """Wherever it lies in a tensor's data, the tensor (or its joint one) is named."""
    checkpoint = tmp_path / "checkpoint"
    hf_to_sharded(models / "hf", checkpoint)
    path = checkpoint / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    data = read_tensors(models / "hf")["model.layers.1.mlp.down_proj.weight"].contiguous()
    raw[raw.index(bytes(data.view(torch.uint8).flatten().tolist())) + 1001] ^= 0x10
    path.write_bytes(raw)
    name = "model.layers.1.mlp.down_proj.weight"
    assert list(named(verify(models / "hf", checkpoint))) == [name, "of B"]
    differences = named(verify(checkpoint, models / "back"))
    assert list(differences) == [name, "of A"]
    assert "1 of 3840 elements differ" in differences[name]
    assert differences["of A"].startswith("__0_0.distcp has changed: SHA-256")


def test_a_flipped_bit_that_no_tensor_shows(models: Path, tmp_path: Path) -> None:
    """In the padding rows of the embedding, the manifest still sees it."""
    checkpoint = tmp_path / "checkpoint"
    hf_to_sharded(models / "hf", checkpoint)
    path = checkpoint / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\0" * 5000) + 2500] ^= 1
    path.write_bytes(raw)
    assert list(named(verify(models / "hf", checkpoint))) == ["of B"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t[UP].zero_(), {UP}),
        (lambda t: t[UP].mul_(0.5), {UP}),
        (lambda t: t.update({UP: t[UP].flip(0)}), {UP}),
        (lambda t: t.update({Q: t[Q].view(6, 2, 8, 48).transpose(1, 2).reshape(96, 48)}), {Q}),
        (
            lambda t: t.update(
                {
                    "model.layers.0.input_layernorm.weight": t["model.layers.1.input_layernorm.weight"],
                    "model.layers.1.input_layernorm.weight": t["model.layers.0.input_layernorm.weight"],
                }
            ),
            {"model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"},
        ),
        (lambda t: t.pop(UP), {UP}),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), {"extra.weight"}),
        (lambda t: t.update({UP: t[UP][:, :24]}), {UP}),
        (lambda t: t.update({UP: t[UP].float()}), {UP}),
        (lambda t: t[UP].view(-1)[5].fill_(math.nan), {UP}),
        (lambda t: t[UP].view(-1)[5].fill_(math.inf), {UP}),
    ],
    ids=[
        "zeroed", "halved", "rows-reversed", "rows-permuted", "layers-swapped", "missing", "extra", "shape", "dtype",
        "nan", "inf",
    ],
)  # fmt: skip
def test_changed_tensors_are_named(models: Path, back: Path, change: Callable, expected: set[str]) -> None:
    spoil(back, change)
    assert set(named(verify(models / "checkpoint", back))) == expected
    assert set(named(verify(back, models / "hf"))) == expected


def test_messages(models: Path, back: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors[UP] = tensors[UP][:40]
        tensors.pop(Q)

    spoil(back, change)
    differences = named(verify(models / "hf", back))
    want = "dtype torch.bfloat16 against torch.float32; after a cast to torch.bfloat16: equal"
    assert differences["model.norm.weight"] == want
    assert differences[UP] == "shape [80, 48] against [40, 48]"
    assert differences[Q] == "missing in B"


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
            "rope.theta",
            "10000.0 against 500000.0",
        ),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps", "1e-06 against 1e-05"),
        ({"bos_token_id": 5}, "bos_token_id", "1 against 5"),
        ({"eos_token_id": [2, 3]}, "eos_token_id", "2 against [2, 3]"),
        ({"max_position_embeddings": 32}, "max_position_embeddings", "64 against 32"),
    ],
)
def test_changed_config_is_named(models: Path, back: Path, changes: dict, name: str, message: str) -> None:
    change_json(back / "config.json", **changes)
    assert named(verify(models / "hf", back)) == {name: message}


def test_a_config_that_contradicts_itself_is_a_difference(models: Path, back: Path) -> None:
    """rope_theta changed in one spelling only: 4.x and 5.x would compute different models."""
    change_json(back / "config.json", rope_theta=5e5)
    differences = named(verify(models / "hf", back))
    assert "disagree" in differences["config.json of B"]
    assert list(named(verify(back, models / "hf"))) == ["config.json of A"]


def test_layers_missing_from_the_config(models: Path, back: Path) -> None:
    change_json(back / "config.json", num_hidden_layers=1)
    assert named(verify(models / "hf", back)) == {"num_layers": "2 against 1"}  # the tensors are all there


def test_a_special_token_that_moved_is_named(models: Path, back: Path) -> None:
    """</s> becomes another token, in every file that says which one it is."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change_json(back / name, eos_token="<unk>")
    assert named(verify(models / "checkpoint", back))["eos_token"] == "'</s>' against '<unk>'"
    assert named(verify(models / "hf", back))["eos_token"] == "'</s>' against '<unk>'"


def test_changed_tokenizer_is_named(models: Path, back: Path) -> None:
    tokenizer = json.loads((back / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[310:312]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    change_json(back / "tokenizer.json", **tokenizer)
    assert "2 tokens differ" in str(named(verify(models / "checkpoint", back)))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (back / name).unlink()
    assert named(verify(models / "hf", back))["tokenizer"] == "missing in B"


def test_changed_generation_config_is_named(models: Path, back: Path) -> None:
    change_json(back / "generation_config.json", eos_token_id=7)
    assert named(verify(models / "hf", back)) == {"eos_token_id": "2 against 7"}


def test_a_tied_head(tmp_path: Path) -> None:
    """Stored or left out, it is the same model; stored with other values, it is not."""
    a = write_tiny_llama(tmp_path / "a", tie_word_embeddings=True)
    b = write_tiny_llama(tmp_path / "b", tie_word_embeddings=True)
    spoil(b, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert verify(a, b).differences == ()
    spoil(b, lambda t: t["lm_head.weight"].add_(1))
    differences = named(verify(a, b))
    assert list(differences) == ["lm_head.weight"]
    assert "tied" in differences["lm_head.weight"]


def test_a_truncated_side_is_a_difference_by_name(models: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    hf_to_sharded(models / "hf", checkpoint)
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-3000])
    differences = named(verify(models / "hf", checkpoint))
    assert list(differences) == ["lm_head.weight", "of B"]  # written last
    assert "cannot be read" in differences["lm_head.weight"]


def test_layers_swapped_in_the_weights(models: Path, back: Path) -> None:
    """Every tensor of layer 0 and of layer 1 changes places."""

    def swap(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    spoil(back, swap)
    wanted = {name for name in read_tensors(back) if ".layers." in name}
    assert len(wanted) == 18
    assert set(named(verify(models / "checkpoint", back))) == wanted


# ---- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_stands_for_its_directory(models: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(models / "back" / "manifest.json", tmp_path / "alone")
    for manifest in (
        models / "checkpoint" / "manifest.json",
        models / "back" / "manifest.json",
        tmp_path / "alone",
    ):
        for other in ("hf", "checkpoint", "back"):
            assert verify(models / other, manifest).differences == ()
            assert verify(manifest, models / other).differences == ()
    result = verify(models / "checkpoint" / "manifest.json", tmp_path / "alone")
    assert result.differences == () and result.num_tensors == 21


def test_what_differs_from_a_manifest_is_named(models: Path, back: Path) -> None:
    manifest = models / "checkpoint" / "manifest.json"
    spoil(back, lambda t: t[UP].view(torch.int16)[3, 7].bitwise_xor_(1))
    assert named(verify(back, manifest)).keys() == {UP}
    assert named(verify(manifest, back))[UP].startswith("SHA-256 ")
    spoil(back, lambda t: (t.pop(UP), t.update({Q: t[Q].float()})))
    differences = named(verify(manifest, back))
    assert differences[UP] == "missing in B"
    assert differences[Q].startswith(
        "dtype torch.bfloat16 against torch.float32; after a cast to torch.bfloat16: equal"
    )
    change_json(
        back / "config.json", rope_theta=5e5, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert named(verify(manifest, back))["rope.theta"] == "10000.0 against 500000.0"


def test_a_tokenizer_that_differs_from_a_manifest_is_named(models: Path, back: Path) -> None:
    manifest = models / "back" / "manifest.json"
    change_json(back / "tokenizer_config.json", eos_token="<unk>")
    assert named(verify(back, manifest))["eos_token"] == "'<unk>' against '</s>'"
    (back / "tokenizer.model").unlink()
    tokenizer = json.loads((back / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].update({"▁": 310, "zz": 311})
    change_json(back / "tokenizer.json", **tokenizer)
    assert "vocabulary" in named(verify(back, manifest))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (back / name).unlink()
    assert named(verify(back, manifest)) == {"tokenizer": "missing in A"}


def test_a_file_that_is_no_manifest(models: Path, tmp_path: Path) -> None:
    bad = tmp_path / "manifest.json"
    for text, said in (
        ("{", "is not valid JSON"),
        ("[]", "is not the manifest"),
        ('{"format": "x"}', "does not say"),
        ('{"format": "meditron-train-manifest/1", "files": {}}', "no hashes of tensors"),
    ):
        bad.write_text(text)
        with refused("manifest.json", said):
            verify(models / "hf", bad)
    with refused("--logits needs the weights"):
        verify(models / "hf", models / "back" / "manifest.json", logits=True)


@pytest.mark.parametrize("dtype", mostly_long(["bf16", "fp16"], "bf16"))
def test_a_declared_cast(tmp_path: Path, dtype: str) -> None:
    """By the manifest of what was cast, or by the option; what is not the cast of the other side still differs."""
    source = write_tiny_llama(tmp_path / "source")
    hf_to_sharded(source, tmp_path / "checkpoint", dtype=dtype)
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    result = verify(source, tmp_path / "checkpoint")
    assert (result.differences, result.cast) == ((), {"bf16": "bfloat16", "fp16": "float16"}[dtype])
    assert verify(source, tmp_path / "checkpoint" / "manifest.json").differences == ()
    assert len(verify(source, tmp_path / "back").differences) == 21  # written without a cast of its own
    assert verify(source, tmp_path / "back", dtype=dtype).differences == ()
    (tmp_path / "back" / "manifest.json").unlink()
    spoil(tmp_path / "back", lambda t: t[UP][2].zero_())
    assert named(verify(source, tmp_path / "back", dtype=dtype)).keys() == {UP}
    other = "fp16" if dtype == "bf16" else "bf16"
    assert len(verify(source, tmp_path / "back", dtype=other).differences) == 21


def test_what_is_not_a_model(models: Path, tmp_path: Path) -> None:
    with refused("there is no directory", "nothing"):
        verify(models / "hf", tmp_path / "nothing")
    with refused("is not a model", "config.json", "meta.json"):
        verify(tmp_path, models / "hf")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000010" / "meta.json").write_text("{}")
    with refused("Did you mean", "step_00000010"):
        verify(tmp_path, models / "hf")


def compare_bits(a: torch.Tensor, b: torch.Tensor) -> str:
    comparison = BitComparison(tuple(a.shape))
    comparison.add(a, b)
    return str(comparison)


def test_bits_not_values() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert compare_bits(nan, nan.clone()) == ""
    assert "first at [0]: 0.0 against -0.0, max |Δ| 0" in compare_bits(
        torch.tensor([0.0]), torch.tensor([-0.0])
    )
    other_nan = torch.tensor([0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert "1 of 2 elements differ, first at [0]: nan against nan, max |Δ| nan" in compare_bits(
        nan, other_nan
    )
    assert "against 2.0, max |Δ| 1" in compare_bits(torch.tensor(1.0), torch.tensor(2.0))


def test_differences_beyond_the_first_block(monkeypatch) -> None:
    monkeypatch.setattr("meditron_train.verify.compare_tensors._BLOCK_ELEMENTS", 10)
    a = torch.zeros(10, 10)
    b = a.clone()
    b[4, 3], b[9, 9] = 1.0, -3.0
    assert compare_bits(a, b).startswith(
        "2 of 100 elements differ, first at [4, 3]: 0.0 against 1.0, max |Δ| 3"
    )
