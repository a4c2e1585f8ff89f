"""Benchmarks answered between training steps: the likeliest option counts, without leaving the parallel model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from meditron_train.config.schema import Config
from meditron_train.data.tokenizing.chat import ChatEncoder, chat_template
from meditron_train.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from meditron_train.errors import UserError
from meditron_train.model import Answers, merged
from meditron_train.model.answers import fitted
from meditron_train.report.metrics import TASK_PREFIX
from meditron_train.tasks.catalogue import Benchmark, find_benchmarks, read_prompt
from meditron_train.tasks.items import find_test_file, read_items
from meditron_train.tasks.questions import question_of
from meditron_train.train.engine import Engine


@dataclass(frozen=True)
class ValidationTask:
    """A benchmark's questions in tokens, and the number of the right answer of each."""

    name: str
    questions: tuple[Answers, ...]
    right: tuple[int, ...]


def read_validation_tasks(config: Config, max_length: int) -> tuple[ValidationTask, ...]:
    """The questions of validation.tasks.

    Args:
        config: the configuration.
        max_length: tokens that the model reads at most; longer prompts lose their beginning.

    Raises:
        UserError: a task is unknown or has no right answers, its file is missing or malformed.
    """
    settings = config.validation
    if not settings.tasks:
        return ()
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.special_tokens)
    return tuple(
        _read(benchmark, config, tokenizer, max_length)
        for benchmark in find_benchmarks(",".join(settings.tasks))
    )


def _read(benchmark: Benchmark, config: Config, tokenizer: Tokenizer, max_length: int) -> ValidationTask:
    if benchmark.is_open:
        raise UserError(
            f"validation.tasks: {benchmark.name} has open questions, which have no options to choose from"
        )
    settings = config.validation
    items = read_items(find_test_file(settings.tasks_data, benchmark), benchmark, settings.tasks_items)
    prompt, chat = read_prompt(benchmark.prompt), config.data.chat
    asked = [question_of(item, prompt) for item in items]
    if chat is None:
        encode: Callable[[str], list[int]] = partial(
            tokenizer.encode, bos=bool(tokenizer.adds_bos), eos=False
        )
        texts = [(question.prompt, question.continuations) for question in asked]
    else:  # as the run's conversations ask, and `evaluate --chat`
        encoder = ChatEncoder(tokenizer.definition, chat_template(chat.template, tokenizer))
        encode = encoder.encode_text
        texts = [(encoder.request(question.messages), question.answers) for question in asked]
    questions = tuple(_in_tokens(text, answers, encode, max_length) for text, answers in texts)
    return ValidationTask(benchmark.name, questions, tuple(item.answer for item in items))


def _in_tokens(
    prompt: str, answers: Sequence[str], encode: Callable[[str], list[int]], max_length: int
) -> Answers:
    """Prompt and answer are encoded together, as they would appear in a text, with BOS as in training."""
    prompt_ids = encode(prompt)
    pairs = [fitted(prompt_ids, encode(prompt + answer)[len(prompt_ids) :], max_length) for answer in answers]
    shortest = min(len(prefix) for prefix, _ in pairs)  # one prefix for all: the longest answer decides
    return Answers(pairs[0][0][-shortest:], tuple(answer for _, answer in pairs))


def task_accuracies(engine: Engine, tasks: tuple[ValidationTask, ...]) -> dict[str, float]:
    """Share of the questions of each task that the model answers correctly, under its key in metrics.jsonl; collective.

    Of equal answers the first counts. Micro-batches are as large as those of training.
    """
    if not tasks:
        return {}
    train = engine.config.train
    engine.gather_params()
    model, accuracies = engine.on_ranks(), {}
    for task in tasks:
        mine = model.log_likelihoods(task.questions, train.seq_len * train.micro_batch_size)
        scores = merged(engine.mesh.gather_objects(mine))
        num_right = 0
        for number, right in enumerate(task.right):
            nats = [score.nats for score in scores[number]]
            num_right += nats.index(max(nats)) == right
        accuracies[f"{TASK_PREFIX}{task.name}"] = num_right / len(task.right)
    return accuracies
