"""How models are opened for the harness."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import transformers

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.training import ParallelSection
from meditron_train.errors import UserError
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.runners import open_parallel_runner, open_runner
from meditron_train.flows.evaluate import Request, evaluate_model
from meditron_train.launcher.environment import detect_launcher
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.distributed import run_ranks
from tests.evaluate.harness.test_run import medqa_rows, write_lines
from tests.evaluate.models import write_tiny_model
from tests.refusal import refused

SIZES: dict[str, Any] = {"device": "cpu", "batch_size": 1, "dtype": "float32"}


def test_nothing_is_fetched_and_no_code_of_the_model_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[dict[str, Any]]] = {}

    def watch(name: str) -> None:
        kind = getattr(transformers, name)
        original = kind.from_pretrained

        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            asked.setdefault(name, []).append(dict(options))
            return original(*arguments, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        watch(name)
    open_runner("transformers", write_tiny_model(tmp_path / "model"), **SIZES)
    assert asked.keys() == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    calls = [options for of_kind in asked.values() for options in of_kind]
    assert all(options["trust_remote_code"] is False for options in calls)
    # The harness opens the configuration and the tokenizer of a directory that is there without a word about it.
    assert asked["AutoModelForCausalLM"][0]["local_files_only"] is True
    assert all(asked[name][0]["local_files_only"] is True for name in ("AutoConfig", "AutoTokenizer"))


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "adapter_config.json").write_text("{}")
    with refused("adapter_config.json"):
        open_runner("transformers", directory, **SIZES)


def test_a_generation_config_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "generation_config.json").write_text("[" * 200_000)
    with refused("generation_config.json"):
        open_runner("transformers", directory, **SIZES)


def write_mismatched_model(directory: Path) -> Path:
    """The tokenizer has more tokens than the embedding has rows."""
    write_tiny_llama(directory, vocab_size=VOCAB_SIZE - 8, bos_token_id=1, eos_token_id=2)
    copy_tokenizer(write_tokenizer_model(directory.with_name("tokenizer")), directory)
    return directory


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with refused(f"the tokenizer has {VOCAB_SIZE} tokens", f"embedding {VOCAB_SIZE - 8} rows"):
        open_runner("transformers", write_mismatched_model(tmp_path / "model"), **SIZES)


def open_mismatched(rank: int, world_size: int, directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_parallel_runner(directory, detect_launcher(os.environ), ParallelSection(), **SIZES)
    return str(caught.value)


@pytest.mark.long
def test_the_parallel_runner_refuses_it_too(tmp_path: Path) -> None:
    (message,) = run_ranks(open_mismatched, 1, write_mismatched_model(tmp_path / "model"))
    assert f"the tokenizer has {VOCAB_SIZE} tokens" in message


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_one_line_says_so(tmp_path: Path) -> None:
    with refused("vllm is not installed"):
        open_runner("vllm", write_tiny_model(tmp_path / "model"), **SIZES)


def test_what_is_for_the_parallel_runner_is_refused_for_others(tmp_path: Path) -> None:
    write_lines(tmp_path / "medqa4.jsonl", medqa_rows(1))
    for overrides, runner, words in (
        (["parallel.pipeline=2"], "transformers", "--runner transformers runs alone"),
        (["parallel.pipelines=2"], "auto", "did you mean parallel.pipeline"),
        (["parallel.pipeline=2"], "auto", "not divisible"),
    ):
        request = Request(
            write_tiny_model(tmp_path / f"model-{runner}-{len(overrides[0])}"),
            "medqa4",
            tmp_path,
            Protocol(),
            runner,
            overrides,
            batch_size=1,
            device="cpu",
            output=tmp_path / "scores.json",
        )
        with refused(words):
            evaluate_model(request, detect_launcher({}))
