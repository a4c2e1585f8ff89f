"""Multiple choice by likelihood, and generation, on the CPU: the parallel runner in one process, beside lm-eval's own
Hugging Face model.

    python -m benchmarks.evaluate [--tiny] [--rounds N] [--questions N] [--json FILE]

Both answer the same requests with the same model, threads and batch size, in turns whose order rotates. Numbers are
questions per second of the fastest round, by the clock and by CPU time, encoding of the texts included; the largest
difference of two log-likelihoods, and the share of texts that differ, show that both compute the same thing. Answers
are texts (the option itself), letters (one token each; lm-eval then computes a prompt once, too) or generated greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.training import ParallelSection
from meditron_train.evaluate.harness.runners import open_parallel_runner, open_runner
from meditron_train.launcher.environment import detect_launcher
from tests.checkpoint.tiny_tokenizer import generated_texts, write_tokenizer_model

PEER, OURS = "lm-eval, Hugging Face model", "meditron-train, parallel runner"
BATCH_SIZE, NEW_TOKENS = 16, 64


def write_model(directory: Path, *, tiny: bool) -> Path:
    """A random Llama of 27 M parameters with a vocabulary of 32,000 rows, or a toy."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)
    normal = dict(hidden_size=320, intermediate_size=864, num_hidden_layers=6, vocab_size=32000)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **(small if tiny else normal),
            num_attention_heads=5 if not tiny else 4,
            num_key_value_heads=5 if not tiny else 4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(directory)
    copy_tokenizer(write_tokenizer_model(directory.with_name("tokenizer")), directory)
    return directory


def requests_of(answers: str, num_questions: int, *, num_words: int) -> list[Instance]:
    """Four options each; prompts of about `num_words` words, whose lengths spread by a third."""
    dice = random.Random(1)
    sentences = generated_texts(400)

    def text(length: int) -> str:
        words: list[str] = []
        while len(words) < length:
            words += dice.choice(sentences).split()
        return " ".join(words[:length])

    requests = []
    for number in range(num_questions):
        prompt = f"Question: {text(dice.randint(num_words * 2 // 3, num_words * 4 // 3))}\nAnswer:"
        if answers == "generated":
            settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
            requests.append(
                Instance("generate_until", doc={}, arguments=(prompt, settings), idx=0, doc_id=number)
            )
            continue
        for option, letter in enumerate("ABCD"):
            answer = letter if answers == "letters" else text(dice.randint(2, 6))
            requests.append(
                Instance("loglikelihood", doc={}, arguments=(prompt, f" {answer}"), idx=option, doc_id=number)
            )
    return requests


def measure(
    runs: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """((wall s, CPU s) of every round after a first one, results) by tool."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    names = list(runs)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = runs[name]()
            if number > 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times, results


def compare(
    answers: str, models: dict[str, Any], requests: list[Instance], num_questions: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each tool: questions per second and ratios to the peer, both by (clock, CPU time)."""
    kind = "generate_until" if answers == "generated" else "loglikelihood"
    runs = {
        name: partial(getattr(model, kind), requests, disable_tqdm=True) for name, model in models.items()
    }
    times, results = measure(runs, rounds)
    pairs = list(zip(results[PEER], results[OURS], strict=True))
    if kind == "generate_until":
        difference = sum(a != b for a, b in pairs) / len(pairs)
    else:
        difference = max(abs(a[0] - b[0]) for a, b in pairs)
    best = {name: [min(column) for column in zip(*of_tool, strict=True)] for name, of_tool in times.items()}
    return [
        {
            "answers": answers,
            "tool": name,
            "questions_per_second": [num_questions / seconds for seconds in best[name]],
            "ratio": [peer / own for peer, own in zip(best[PEER], best[name], strict=True)],
            "difference": difference,
        }
        for name in models
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_model(Path(scratch) / "model", tiny=options.tiny)
        sizes: dict[str, Any] = {"device": "cpu", "batch_size": BATCH_SIZE, "dtype": "float32"}
        models = {
            PEER: open_runner("transformers", directory, **sizes),
            OURS: open_parallel_runner(directory, detect_launcher({}), ParallelSection(), **sizes),
        }
        print(
            f"{torch.get_num_threads()} threads, batch size {BATCH_SIZE}, {options.questions} questions of 4 options"
        )
        print("| answers | tool | questions/s | by CPU time | ratio | by CPU time | difference |")
        print("|---|---|---|---|---|---|---|")
        for answers in ("texts", "letters", "generated"):
            num_words = 12 if options.tiny else 60
            requests = requests_of(answers, options.questions, num_words=num_words)
            for row in compare(answers, models, requests, options.questions, options.rounds):
                found.append(row)
                speeds, ratios = row["questions_per_second"], row["ratio"]
                print(
                    f"| {answers} | {row['tool']} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratios[0]:.2f} | "
                    f"{ratios[1]:.2f} | {row['difference']:.1e} |"
                )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
