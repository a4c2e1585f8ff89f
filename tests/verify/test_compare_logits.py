"""verify --logits: both models run, where they can be compared at all; and declared casts of either side."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_megatron_lm, hf_to_sharded
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.verify.verify import verify
from tests.checkpoint.convert.test_for_megatron_lm import write_source
from tests.checkpoint.tiny_llama import change_json, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.long import mostly_long
from tests.verify.test_verify import UP, named, spoil


def test_logits(models: Path, back: Path) -> None:
    result = verify(models / "checkpoint", back, logits=True)
    assert result.differences == ()
    assert result.logits is not None
    assert (result.logits.max_difference, result.logits.kl_divergence) == (0.0, 0.0)
    assert result.logits.ours_max_difference < 1e-5 * result.logits.largest
    spoil(back, lambda t: t[UP].zero_())
    result = verify(models / "hf", back, logits=True)
    assert result.logits is not None
    assert result.logits.max_difference > 1e-3 and result.logits.ours_max_difference > 1e-3
    assert result.logits.kl_divergence > 0 and result.logits.ours_kl_divergence > 0
    assert [difference.kind for difference in result.differences] == ["tensor", "logits", "logits"]


def test_logits_draw_no_progress_bar(models: Path, back: Path, capfd) -> None:
    from transformers.utils.logging import enable_progress_bar

    enable_progress_bar()
    verify(models / "hf", back, logits=True)
    assert "%|" not in capfd.readouterr().err


def test_logits_of_a_damaged_checkpoint_do_not_hide_the_other_differences(
    models: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(models / "checkpoint", checkpoint)
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-3000])
    result = verify(models / "hf", checkpoint, logits=True)
    assert result.logits is None
    assert "instead of" in named(result)["of B"]
    assert "cannot be computed" in named(result)["fp32"]


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda d: spoil(d, lambda t: t.pop(UP)),
        lambda d: spoil(d, lambda t: t.update({UP: t[UP][:40]})),
        lambda d: spoil(
            d, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300]})
        ),
        lambda d: change_json(d / "config.json", num_hidden_layers=3),
        lambda d: change_json(d / "config.json", num_hidden_layers=1),
    ],
    ids=["missing", "shape", "vocabulary", "more-layers", "fewer-layers"],
)
def test_no_logits_of_models_that_cannot_be_compared(models: Path, back: Path, spoilt: Callable) -> None:
    spoilt(back)
    for a, b in ((models / "hf", back), (back, models / "hf")):
        result = verify(a, b, logits=True)
        assert result.logits is None and len(result.differences) > 1
        assert named(result)["fp32"] == "not computed, see above"


def test_no_logits_of_a_model_that_is_not_what_its_config_says(back: Path) -> None:
    spoil(back, lambda t: t.update({UP: t[UP][:40]}))
    assert UP in named(verify(back, back, logits=True))["fp32"]


def test_a_damaged_tokenizer_does_not_hide_the_other_differences(models: Path, back: Path) -> None:
    (back / "tokenizer.json").write_text("[]")
    result = verify(back, models / "hf", logits=True)
    assert result.logits is None and {d.kind for d in result.differences} == {"tokenizer", "logits"}


@pytest.mark.parametrize("dtype", mostly_long(["bf16", "fp16"], "bf16"))
def test_logits_after_a_declared_cast(tmp_path: Path, dtype: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    hf_to_sharded(source, tmp_path / "checkpoint", dtype=dtype)
    for a, b in ((source, tmp_path / "checkpoint"), (tmp_path / "checkpoint", source)):
        result = verify(a, b, logits=True)
        assert result.differences == () and result.logits is not None
        assert result.logits.max_difference == 0.0


def test_two_casts_in_a_row(tmp_path: Path) -> None:
    """Each command's own check: of the two casts that the manifests declare, the one from A to B counts."""
    source = write_tiny_llama(tmp_path / "source", dtype="bfloat16")
    hf_to_sharded(source, tmp_path / "fp32", dtype="fp32")
    export_hf(tmp_path / "fp32", tmp_path / "bf16", dtype="bf16")
    for a, b in ((tmp_path / "fp32", tmp_path / "bf16"), (tmp_path / "bf16", tmp_path / "fp32")):
        result = verify(a, b)
        assert (result.differences, result.cast) == ((), "bfloat16")
    assert verify(source, tmp_path / "bf16").differences == ()
    (tmp_path / "fp32").rename(tmp_path / "renamed")
    assert (
        len(verify(tmp_path / "renamed", tmp_path / "bf16").differences) == 21
    )  # nothing says what it came from
    assert verify(tmp_path / "renamed", tmp_path / "bf16", dtype="bf16").differences == ()


def test_the_side_that_cannot_be_read_is_named(models: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(models / "checkpoint", tmp_path / "checkpoint")
    preadv = os.preadv

    def fail(descriptor: int, *arguments: object) -> int:
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("os.preadv", fail)
    sides = {"A": (tmp_path / "checkpoint", models / "hf"), "B": (models / "hf", tmp_path / "checkpoint")}
    for label, (a, b) in sides.items():
        messages = [d.message for d in verify(a, b).differences if d.kind == "tensor"]
        assert len(messages) == 21
        assert all(message.startswith(f"{label}: ") for message in messages)


@pytest.mark.parametrize("with_tokenizer", mostly_long([True, False], True))
def test_logits_of_another_megatron(tmp_path: Path, with_tokenizer: bool) -> None:
    source, run = write_source(tmp_path / "source"), tmp_path / "run"
    hf_to_megatron_lm(source, run)
    if not with_tokenizer:
        for path in (run / "manifest.json", *run.glob("*token*"), *source.glob("*token*")):
            path.unlink(missing_ok=True)
    for a, b in ((source, run), (run, source), (run, run)):
        result = verify(a, b, logits=True)
        assert result.differences == () and result.logits is not None
        assert result.logits.max_difference == 0.0


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    source = write_tokenizer_model(write_tiny_llama(tmp_path / "source", vocab_size=131))
    found = named(verify(source, source, logits=True))
    assert "the model's vocabulary has 131 tokens" in found["fp32"]


def test_a_configuration_of_which_transformers_makes_no_model(models: Path, back: Path) -> None:
    change_json(back / "config.json", pad_token_id=100_000)
    assert "transformers cannot build the model" in named(verify(back, back, logits=True))["fp32"]
