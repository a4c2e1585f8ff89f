"""verify and inspect: tokenizer and generation settings, against a directory and against a manifest alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import change_json, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.long import mostly_long
from tests.refusal import refused
from tests.verify.test_verify import named


def swap_ids(directory: Path) -> None:
    """Of two tokens, in tokenizer.json alone; tokenizer.model stays beside it."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[310:312]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    change_json(directory / "tokenizer.json", **tokenizer)


def _without_bos(directory: Path) -> None:
    """4.x goes by the post-processor, 5.x by the setting."""
    change_json(directory / "tokenizer.json", post_processor=None)
    change_json(directory / "tokenizer_config.json", add_bos_token=False)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ids-swapped": (swap_ids, "vocabulary"),
    "no-bos": (_without_bos, "ids"),
    "chat-template": (
        lambda d: change_json(d / "tokenizer_config.json", chat_template="{{ x }}"),
        "chat_template",
    ),
    "special-token": (
        lambda d: change_json(d / "tokenizer_config.json", additional_special_tokens=["ka"]),
        "additional_special_tokens",
    ),
    "eos-in-generation": (
        lambda d: change_json(d / "generation_config.json", eos_token_id=7),
        "eos_token_id",
    ),
}


OTHERS = ("back", "checkpoint", "back/manifest.json", "checkpoint/manifest.json")
QUICK = [*((case, "checkpoint/manifest.json") for case in SPOILT), ("ids-swapped", "back")]


@pytest.mark.parametrize("pair", mostly_long(product(SPOILT, OTHERS), *QUICK), ids="-".join)
def test_what_lies_beside_the_weights_is_compared(models: Path, back: Path, pair: tuple[str, str]) -> None:
    case, other = pair
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
    assert "vocabulary" in named(verify(manifest, back))


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
    assert "vocabulary" in named(verify(back, path))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_generation_settings(models: Path, back: Path, text: str) -> None:
    (back / "generation_config.json").write_text(text)
    (problem,) = inspect_directory(back)["problems"]
    assert "generation_config.json" in problem
    for other in ("back", "back/manifest.json"):
        assert list(named(verify(models / other, back))) == ["generation_config.json"]
    with refused("generation_config.json"):
        hf_to_sharded(back, back.parent / "new")


def test_settings_of_the_tokenizer_survive(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_tokenizer_model(write_tiny_llama(tmp_path / "source", vocab_size=401))
    special = {"content": "<zz>", "special": True, "normalized": False}
    settings = {
        "add_bos_token": True, "add_eos_token": True, "additional_special_tokens": ["<zz>"],
        "added_tokens_decoder": {"400": special}, "tokenizer_class": "LlamaTokenizer", "legacy": False,
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    hf_to_sharded(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    for other in ("checkpoint", "back", "checkpoint/manifest.json"):
        assert verify(source, tmp_path / other).differences == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer.encode("ka mo <zz>")
    assert (ids[0], ids[-2:]) == (1, [400, 2])
    assert "<zz>" in tokenizer.all_special_tokens
    assert "<zz>" not in tokenizer.decode(ids, skip_special_tokens=True)
    change_json(source / "tokenizer_config.json", add_eos_token=False, additional_special_tokens=[])
    assert {"ids", "additional_special_tokens"} <= set(named(verify(source, tmp_path / "checkpoint")))


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype": lambda m: m["tensors"]["model.norm.weight"].update(dtype="nn"),
    "dtype-number": lambda m: m["tensors"]["model.norm.weight"].update(dtype=3),
    "tokenizer": lambda m: m.update(tokenizer="abc"),
    "named-tokens": lambda m: m["tokenizer"].update(named_tokens=[1]),
    "settings": lambda m: m["tokenizer"].update(settings=3),
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
