"""Benchmarks on a model: scores with their uncertainty, and every answer kept beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.evaluate.harness.lm_task import Protocol, make_task
from meditron_train.evaluate.harness.parse_answer import parse_answer
from meditron_train.evaluate.harness.statistics import bootstrap_interval
from meditron_train.files import sha256_file
from meditron_train.tasks.catalogue import Benchmark, Prompt, read_prompt
from meditron_train.tasks.formats import Item
from meditron_train.tasks.items import find_file, find_test_file, read_items


@dataclass(frozen=True)
class Answer:
    """One item with one seed.

    Attributes:
        prompt: as it was asked; where `is_cut`, the model saw only its end.
        chosen: the option that counts; None: unparsed.
        chosen_by_length: the option with the largest log-likelihood per character, as acc_norm of the harness has it;
            None where options are letters.
        log_likelihoods: of the options (likelihood).
        generations: texts (cot, sc-cot, open).
        parsed: the option read from each generation; None where none could be.
        is_tie: several options had the most votes; the first of them counts.
        is_cut: the prompt is longer than what the model reads, and lost its beginning.
    """

    id: str
    seed: int
    prompt: str
    answer: int | None
    chosen: int | None
    chosen_by_length: int | None = None
    log_likelihoods: tuple[float, ...] = ()
    generations: tuple[str, ...] = ()
    parsed: tuple[int | None, ...] = ()
    is_tie: bool = False
    reference: str = ""
    is_cut: bool = False

    @property
    def is_correct(self) -> bool:
        return self.answer is not None and self.chosen == self.answer


@dataclass(frozen=True)
class Score:
    """The result of one benchmark.

    Attributes:
        accuracy: an answer that cannot be parsed counts as wrong.
        accuracy_by_length: of `Answer.chosen_by_length`; None where options are letters.
        spread: standard deviation over seeds.
        accuracy_of_parsed: leaves out the answers that cannot be parsed.
        num_cut: answers to prompts that lost their beginning.
    """

    benchmark: str
    title: str
    protocol: Protocol
    file: str
    file_sha256: str
    num_items: int
    accuracy: float | None
    interval: tuple[float, float] | None
    accuracy_by_length: float | None
    spread: float
    num_unparsed: int
    num_ties: int
    accuracy_of_parsed: float | None
    chance: float | None
    answers: tuple[Answer, ...]
    num_cut: int = 0

    def summary(self) -> dict[str, Any]:
        """Everything but the answers, JSON-ready."""
        values = asdict(self)
        del values["answers"]
        return values


@dataclass(frozen=True)
class Questions:
    """All that is asked of a benchmark, read before a model is opened.

    Attributes:
        path: the file of the items.
        examples: of which some are shown; empty without shots.
    """

    benchmark: Benchmark
    protocol: Protocol
    prompt: Prompt
    path: Path
    items: Sequence[Item]
    examples: Sequence[Item]


def read_questions(
    benchmark: Benchmark, data: Path, protocol: Protocol, *, limit: int | None = None
) -> Questions:
    """The questions of a benchmark whose files lie in `data`.

    Args:
        benchmark: what is asked.
        data: directory.
        protocol: how it is asked.
        limit: number of items; None: all.

    Raises:
        UserError: a file is missing or malformed, or there are too few examples to show.
    """
    path = find_test_file(data, benchmark)
    items = read_items(path, benchmark, limit)
    prompt = read_prompt(benchmark.prompt, with_reasons=protocol.with_reasons)
    return Questions(benchmark, protocol, prompt, path, items, _examples(data, benchmark, items, protocol))


def run_benchmark(model: Any, questions: Questions) -> Score:
    """Ask an lm_eval `LM`.

    Raises:
        UserError: as `check_model`.
    """
    check_model(model, questions)
    answers: list[Answer] = []
    for seed in questions.protocol.seeds:
        answers += _ask(model, questions, seed)
    return _score(questions, answers)


def check_model(model: Any, questions: Questions) -> None:
    """Find out before anything is asked that an lm_eval `LM` cannot be asked in this way.

    Raises:
        UserError: the questions are to be put by a chat template, which the model's tokenizer lacks, or their answers
            leave no room for them.
    """
    protocol, tokenizer = questions.protocol, getattr(model, "tokenizer", None)
    if protocol.chat and tokenizer is not None and not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer of the model has no chat template; ask without --chat")
    length = getattr(model, "max_length", None)
    is_generated = protocol.with_reasons or questions.benchmark.is_open
    if is_generated and length is not None and protocol.max_new_tokens >= length:
        raise UserError(
            f"--max-new-tokens is {protocol.max_new_tokens}; the model reads {length} tokens, with the prompt"
        )


def _examples(data: Path, benchmark: Benchmark, items: Sequence[Item], protocol: Protocol) -> list[Item]:
    if protocol.shots == 0:
        return []
    path = find_file(data, benchmark, "train")
    if path is None:
        raise UserError(
            f"--shots {protocol.shots} needs examples that are not asked: {data / benchmark.file_name}/train.jsonl"
        )
    asked = {item.question for item in items}
    examples = [item for item in read_items(path, benchmark) if item.question not in asked]
    which = "are not asked"
    if protocol.with_reasons and not benchmark.is_open:
        examples = [item for item in examples if item.explanation]
        which += f" and explain their answer, as --mode {protocol.mode} shows it"
    if len(examples) < protocol.shots:
        raise UserError(f"{path} has {len(examples)} examples that {which}; --shots is {protocol.shots}")
    return examples


def _ask(model: Any, questions: Questions, seed: int) -> list[Answer]:
    import torch
    from lm_eval.evaluator import evaluate

    benchmark, protocol = questions.benchmark, questions.protocol
    task = make_task(benchmark, questions.prompt, questions.items, questions.examples, protocol)
    task.set_fewshot_seed(seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Not `simple_evaluate`, which looks for the versions of everything on the machine: seconds for each run.
        found = evaluate(
            model,
            {benchmark.name: task},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=protocol.chat,
            fewshot_as_multiturn=protocol.chat,
        )
    assert found is not None  # only rank 0 of several evaluates
    samples = sorted(found["samples"][benchmark.name], key=lambda sample: sample["doc_id"])
    return [
        replace(_answer(item, sample, questions, seed), is_cut=_is_cut(model, sample))
        for item, sample in zip(questions.items, samples, strict=True)
    ]


def _requests(sample: dict[str, Any]) -> list[tuple[str, Any]]:
    """Prompts, each with the continuation that is scored, or the settings of the generation."""
    found = sample["arguments"]
    if isinstance(found, dict):
        return [(str(values["arg_0"]), values["arg_1"]) for values in found.values()]
    return [(str(prompt), rest) for prompt, rest in found]


def _is_cut(model: Any, sample: dict[str, Any]) -> bool:
    """Whether a prompt lost its beginning, as every runner cuts what is too long; False where that is not known."""
    length, encode = getattr(model, "max_length", None), getattr(model, "tok_encode", None)
    if length is None or encode is None:
        return False
    for prompt, rest in _requests(sample):
        if isinstance(rest, str):  # the last token is only predicted
            num_tokens = len(encode(prompt + rest)) - 1
        else:
            num_tokens = len(encode(prompt)) + rest["max_gen_toks"]
        if num_tokens > length:
            return True
    return False


def _answer(item: Item, sample: dict[str, Any], questions: Questions, seed: int) -> Answer:
    prompt, is_open, context = questions.prompt, questions.benchmark.is_open, _requests(sample)[0][0]
    if not questions.protocol.with_reasons and not is_open:
        scores = tuple(float(response[0][0]) for response in sample["resps"])
        by_length = None
        if prompt.answer_with == "text":
            by_length = _largest(
                [score / len(text) for score, text in zip(scores, item.options, strict=True)]
            )
        return Answer(item.id, seed, context, item.answer, _largest(scores), by_length, scores)
    generations = tuple(str(text) for text in sample["resps"][0])
    if is_open:
        return Answer(item.id, seed, context, None, None, generations=generations, reference=item.reference)
    parsed = tuple(parse_answer(text, prompt, item.options) for text in generations)
    votes = Counter(option for option in parsed if option is not None).most_common()
    return Answer(
        item.id,
        seed,
        context,
        item.answer,
        votes[0][0] if votes else None,
        generations=generations,
        parsed=parsed,
        is_tie=len(votes) > 1 and votes[0][1] == votes[1][1],
    )


def _largest(scores: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(scores)), key=scores.__getitem__)


def _score(questions: Questions, answers: Sequence[Answer]) -> Score:
    benchmark, num_items = questions.benchmark, len(questions.items)
    unscored = Score(
        benchmark=benchmark.name,
        title=benchmark.title,
        protocol=questions.protocol,
        file=str(questions.path),
        file_sha256=sha256_file(questions.path),
        num_items=num_items,
        accuracy=None,
        interval=None,
        accuracy_by_length=None,
        spread=0.0,
        num_unparsed=0,
        num_ties=0,
        accuracy_of_parsed=None,
        chance=None,
        answers=tuple(answers),
        num_cut=sum(answer.is_cut for answer in answers),
    )
    if benchmark.is_open:
        return unscored
    by_seed = [answers[first : first + num_items] for first in range(0, len(answers), num_items)]
    accuracies = [sum(answer.is_correct for answer in run) / num_items for run in by_seed]
    per_item = [statistics.fmean(run[i].is_correct for run in by_seed) for i in range(num_items)]
    parsed = [answer for answer in answers if answer.chosen is not None]
    return replace(
        unscored,
        accuracy=statistics.fmean(accuracies),
        interval=bootstrap_interval(per_item),
        accuracy_by_length=statistics.fmean(answer.chosen_by_length == answer.answer for answer in answers)
        if answers[0].chosen_by_length is not None
        else None,
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        num_unparsed=len(answers) - len(parsed),
        num_ties=sum(answer.is_tie for answer in answers),
        accuracy_of_parsed=statistics.fmean(answer.is_correct for answer in parsed) if parsed else None,
        chance=statistics.fmean(1 / len(item.options) for item in questions.items),
    )
