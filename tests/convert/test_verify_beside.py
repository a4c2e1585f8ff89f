"""verify and inspect: tokenizer and generation settings, against a directory and against a manifest alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.export import export_hf
from meditron_train.convert.hf_to_megatron import hf_to_megatron
from meditron_train.convert.inspect import inspect_directory
from meditron_train.convert.verify import verify
from tests.checkpoint.tiny_llama import change_json, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.convert.test_verify import named
from tests.refusal import refused


def swap_ids(directory: Path) -> None:
    """Of two tokens, in tokenizer.json alone; tokenizer.model stays beside it."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[310:312]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    change_json(directory / "tokenizer.json", **tokenizer)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ids-swapped": (swap_ids, "tokenizer.json"),
    "no-post-processor": (lambda d: change_json(d / "tokenizer.json", post_processor=None), "tokenizer.json"),
    "chat-template": (
        lambda d: change_json(d / "tokenizer_config.json", chat_template="{{ x }}"),
        "chat_template",
    ),
    "eos-appended": (lambda d: change_json(d / "tokenizer_config.json", add_eos_token=True), "add_eos_token"),
    "special-token": (
        lambda d: change_json(d / "tokenizer_config.json", additional_special_tokens=["ka"]),
        "additional_special_tokens",
    ),
    "eos-in-generation": (
        lambda d: change_json(d / "generation_config.json", eos_token_id=7),
        "eos_token_id",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("other", ["back", "checkpoint", "back/manifest.json", "checkpoint/manifest.json"])
def test_what_lies_beside_the_weights_is_compared(models: Path, back: Path, case: str, other: str) -> None:
    spoil, expected = SPOILT[case]
    spoil(back)
    for found in (named(verify(models / other, back)), named(verify(back, models / other))):
        assert any(name.startswith(expected) for name in found), found


def test_a_source_with_fewer_files_than_the_manifest(models: Path) -> None:
    """hf/ has tokenizer.model alone, a converted directory tokenizer.json too; one with that alone is the same."""
    assert not (models / "hf" / "tokenizer.json").exists()
    assert verify(models / "hf", models / "checkpoint" / "manifest.json").differences == ()


def test_one_tokenizer_file_left(models: Path, back: Path) -> None:
    (back / "tokenizer.model").unlink()
    manifest = models / "checkpoint" / "manifest.json"
    assert verify(back, manifest).differences == verify(manifest, back).differences == ()
    swap_ids(back)
    assert "vocabulary_sha256" in named(verify(manifest, back))


def test_a_swapped_tokenizer_json_against_a_side_without_one(
    models: Path, back: Path, tmp_path: Path
) -> None:
    """Only the source's tokenizer.model is left to compare with."""
    swap_ids(back)
    manifest = json.loads((models / "checkpoint" / "manifest.json").read_text())
    del manifest["tokenizer"]["files"]["tokenizer.json"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "tokenizer.json" in named(verify(tmp_path / "manifest.json", back))


def test_a_manifest_of_an_earlier_version(models: Path, back: Path, tmp_path: Path) -> None:
    manifest = json.loads((models / "back" / "manifest.json").read_text())
    del manifest["generation"]
    kept = ("num_tokens", "named_tokens", "vocabulary_sha256")
    manifest["tokenizer"] = {
        **{key: manifest["tokenizer"][key] for key in kept}, "probe_ids_sha256": "00", "merges_sha256": None,
    }  # fmt: skip
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    assert verify(back, path).differences == verify(path, back).differences == ()
    swap_ids(back)
    assert "tokenizer.json" in named(verify(back, path))


def test_inspect_sees_that_the_two_files_disagree(back: Path) -> None:
    assert inspect_directory(back)["intact"]
    swap_ids(back)
    (problem,) = inspect_directory(back)["problems"]
    assert "tokenizer.model against tokenizer.json: 2 tokens differ" in problem


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_generation_settings(models: Path, back: Path, text: str) -> None:
    (back / "generation_config.json").write_text(text)
    (problem,) = inspect_directory(back)["problems"]
    assert "generation_config.json" in problem
    for other in ("back", "back/manifest.json"):
        assert list(named(verify(models / other, back))) == ["generation_config.json"]
    with refused("generation_config.json"):
        hf_to_megatron(back, back.parent / "new")


def test_settings_of_the_tokenizer_survive(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_tokenizer_model(write_tiny_llama(tmp_path / "source", vocab_size=401))
    special = {"content": "<zz>", "special": True}
    settings = {
        "add_bos_token": True, "add_eos_token": True, "additional_special_tokens": ["<zz>"],
        "added_tokens_decoder": {"400": special}, "tokenizer_class": "LlamaTokenizer", "legacy": False,
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    hf_to_megatron(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    for other in ("checkpoint", "back", "checkpoint/manifest.json"):
        assert verify(source, tmp_path / other).differences == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer.encode("ka mo <zz>")
    assert (ids[0], ids[-2:]) == (1, [400, 2])
    assert "<zz>" in tokenizer.all_special_tokens
    assert "<zz>" not in tokenizer.decode(ids, skip_special_tokens=True)
    change_json(source / "tokenizer_config.json", add_eos_token=False, additional_special_tokens=[])
    assert set(named(verify(source, tmp_path / "checkpoint"))) == {
        "add_eos_token",
        "additional_special_tokens",
    }


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype": lambda m: m["tensors"]["model.norm.weight"].update(dtype="nn"),
    "dtype-number": lambda m: m["tensors"]["model.norm.weight"].update(dtype=3),
    "tokenizer": lambda m: m.update(tokenizer="abc"),
    "named-tokens": lambda m: m["tokenizer"].update(named_tokens=[1]),
    "files": lambda m: m["tokenizer"].update(files={"tokenizer.json": 3}),
    "generation": lambda m: m.update(generation=[1]),
    "tensors": lambda m: m.update(tensors=["model.norm.weight"]),
    "entry": lambda m: m["tensors"].update({"model.norm.weight": "x"}),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifests(models: Path, back: Path, tmp_path: Path, case: str) -> None:
    manifest = json.loads((models / "back" / "manifest.json").read_text())
    BAD_MANIFESTS[case](manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with refused("manifest.json is not the manifest of a converted directory"):
        verify(back, tmp_path / "manifest.json")
    shutil.copy(tmp_path / "manifest.json", back)
    assert inspect_directory(back)["intact"] == (case not in ("tensors", "entry"))
    assert verify(models / "hf", back).differences == ()


@pytest.mark.parametrize("cast", [["a"], "nn", 3])
def test_a_cast_that_is_none(models: Path, back: Path, tmp_path: Path, cast: object) -> None:
    shutil.copy(models / "back" / "manifest.json", back)
    change_json(back / "manifest.json", cast=cast)
    assert verify(models / "hf", back).differences == ()
    assert verify(models / "hf", back / "manifest.json").differences == ()
