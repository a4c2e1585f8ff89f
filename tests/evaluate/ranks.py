"""What ranks do in the tests of evaluation: open a model together and ask it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def open_model(directory: Path, parallel: Mapping[str, Any]) -> Any:
    """The model on the ranks of this process's job, fp32 on the CPU."""
    from meditron_train.config.training import ParallelSection
    from meditron_train.evaluate.parallel_model import open_parallel_model
    from meditron_train.launcher.environment import detect_launcher

    launch = detect_launcher(os.environ)
    return open_parallel_model(directory, launch, ParallelSection(**parallel), device="cpu")


def ask(
    rank: int,
    world_size: int,
    directory: Path,
    parallel: Mapping[str, Any],
    questions: Sequence[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]],
    max_tokens: int,
) -> tuple[dict[int, list[tuple[float, bool]]], dict[int, list[list[float]]]]:
    """((nats, is greedy) of every answer, logits after every prefix and after each token of its first answer), by the
    number of the question."""
    from meditron_train.model import Answers, Decoding, merged

    model = open_model(directory, parallel)
    asked = [Answers(prefix, answers) for prefix, answers in questions]
    scores = merged(model.mesh.gather_objects(model.on_ranks.log_likelihoods(asked, max_tokens)))
    decoding, logits = Decoding(model.on_ranks, len(asked)), {number: [] for number in range(len(asked))}
    new = {number: question.prefix for number, question in enumerate(asked)}
    while new:
        found = {number: values.tolist() for number, values in decoding.next_logits(new).items()}
        found = merged(model.mesh.gather_objects(found))
        assert found.keys() == new.keys()
        for number, values in found.items():
            logits[number].append(values)
        rest = {number: asked[number].answers[0][len(logits[number]) - 1 :] for number in new}
        new = {number: tokens[:1] for number, tokens in rest.items() if tokens}
    plain = {number: [(score.nats, score.is_greedy) for score in found] for number, found in scores.items()}
    return plain, logits


def answer_benchmark(
    rank: int,
    world_size: int,
    directory: Path,
    parallel: Mapping[str, Any],
    data: Path,
    asked: Sequence[tuple[str, Any]],
) -> list[tuple[Any, ...]]:
    """The answers of the harness to each (benchmark, protocol), by the parallel runner on every rank."""
    from meditron_train.config.training import ParallelSection
    from meditron_train.evaluate.harness.runners import open_parallel_runner
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.tasks.catalogue import BENCHMARKS
    from tests.evaluate.asking import ask as ask_benchmark

    lm = open_parallel_runner(
        directory,
        detect_launcher(os.environ),
        ParallelSection(**parallel),
        device="cpu",
        batch_size=4,
        dtype="float32",
        chat=any(protocol.chat for _, protocol in asked),
    )
    return [ask_benchmark(lm, BENCHMARKS[name], data, protocol).answers for name, protocol in asked]
