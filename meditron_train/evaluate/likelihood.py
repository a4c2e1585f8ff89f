"""Which of several answers a model finds likeliest, and how well it predicts text.

Conventions. An option follows the prompt after one space. Its log-likelihood is the sum over its tokens of
ln p(token | everything before it, BOS included); normalized, that sum is divided by the option's length in UTF-8
bytes, which does not depend on the tokenizer. Perplexity is exp of the mean of -ln p over all tokens but BOS, each
document read alone.

Legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch

from meditron_train.errors import UserError
from meditron_train.evaluate.language_model import LanguageModel


class MultipleChoice(Protocol):
    """A question: `options[answer]` is the true one."""

    @property
    def prompt(self) -> str: ...

    @property
    def options(self) -> Sequence[str]: ...

    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class OptionScore:
    """Log-likelihood of one option in nats, and its length."""

    log_likelihood: float
    num_tokens: int
    num_bytes: int

    @property
    def normalized(self) -> float:
        """Nats per UTF-8 byte."""
        return self.log_likelihood / self.num_bytes


@dataclass(frozen=True)
class Accuracy:
    """How many of a set of questions were answered correctly."""

    num_questions: int
    num_correct: int

    @property
    def value(self) -> float:
        return self.num_correct / self.num_questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (Wilson, 1927)."""
        n, p, z = self.num_questions, self.value, 1.959964
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Accuracy by the summed and by the normalized log-likelihood, and what guessing would reach on average."""

    by_sum: Accuracy
    by_normalized: Accuracy
    chance: float
    chosen: tuple[int, ...]  # the option with the largest sum, for each question


def multiple_choice_accuracy(
    model: LanguageModel, questions: Sequence[MultipleChoice], *, batch_size: int = 64
) -> MultipleChoiceResult:
    """Let the model choose the likeliest option of every question. Of equal options the first counts as chosen.

    Raises:
        UserError: there are no questions, an answer is outside its options, an option is empty, or a text is
            longer than the model was made for.
    """
    if not questions:
        raise UserError("there are no questions to evaluate")
    for number, question in enumerate(questions):
        if not 0 <= question.answer < len(question.options):
            raise UserError(
                f"question {number} has {len(question.options)} options, but its answer is {question.answer}"
            )
    rows = [(question.prompt, option) for question in questions for option in question.options]
    scores = iter(score_continuations(model, rows, batch_size))
    scored = [[next(scores) for _ in question.options] for question in questions]
    chosen = tuple(_best([score.log_likelihood for score in options]) for options in scored)
    normalized = [_best([score.normalized for score in options]) for options in scored]
    answers = [question.answer for question in questions]
    return MultipleChoiceResult(
        by_sum=Accuracy(len(answers), sum(a == b for a, b in zip(chosen, answers, strict=True))),
        by_normalized=Accuracy(len(answers), sum(a == b for a, b in zip(normalized, answers, strict=True))),
        chance=sum(1 / len(question.options) for question in questions) / len(questions),
        chosen=chosen,
    )


def perplexity(model: LanguageModel, documents: Iterable[Sequence[int]], *, batch_size: int = 16) -> float:
    """Perplexity of documents of token ids, BOS first; each is cut at the model's longest sequence.

    Raises:
        UserError: no document has a token to predict.
    """
    rows = [list(document)[: model.max_num_tokens] for document in documents]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError("there is no text to measure the perplexity of: every document is empty")
    total, count = 0.0, 0
    for _, log_p in _token_log_likelihoods(model, rows, batch_size):
        total, count = total + float(log_p.double().sum()), count + len(log_p)
    return math.exp(-total / count)


def score_continuations(
    model: LanguageModel, rows: Sequence[tuple[str, str]], batch_size: int
) -> list[OptionScore]:
    """Score each row of (prompt, option), the option as the continuation of the prompt.

    Raises:
        UserError: an option is empty, or a text is longer than the model was made for.
    """
    encoded = [_encode(model, prompt, option) for prompt, option in rows]
    scores: list[OptionScore | None] = [None] * len(rows)
    for index, log_p in _token_log_likelihoods(model, [ids for ids, _ in encoded], batch_size):
        num_tokens = len(encoded[index][0]) - encoded[index][1]
        total = float(log_p[-num_tokens:].double().sum())
        scores[index] = OptionScore(total, num_tokens, len(rows[index][1].encode()))
    return [score for score in scores if score is not None]


def _encode(model: LanguageModel, prompt: str, option: str) -> tuple[list[int], int]:
    """Token ids of prompt and option, and the number of tokens that belong to the prompt.

    Both are encoded together, as they would appear in a text. Where the prompt's last characters and the option's
    first share a token, that token counts for the option.
    """
    if not option.strip():
        raise UserError(f"an option of the question {prompt!r} is empty")
    prompt_ids, ids = model.tokenizer.encode(prompt), model.tokenizer.encode(f"{prompt} {option}")
    num_shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    )
    if len(ids) > model.max_num_tokens:
        raise UserError(
            f"a question with its option has {len(ids)} tokens; the model reads at most {model.max_num_tokens}: "
            f"{prompt[:80]!r}…"
        )
    if num_shared == 0:
        raise UserError(
            f"the prompt {prompt!r} has no token before its options (the tokenizer adds no BOS): lengthen it"
        )
    return ids, num_shared


def _token_log_likelihoods(
    model: LanguageModel, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The log-likelihoods of tokens, rows of similar length together.

    Rows are padded on the right: in a causal model what follows a token cannot change it.

    Yields:
        (row number, ln p of its tokens but the first [S - 1]).
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(rows[batch[-1]])
        ids_BS = torch.tensor([list(rows[index]) + [0] * (longest - len(rows[index])) for index in batch])
        log_p_BSV = model.logits(ids_BS)[:, :-1].log_softmax(-1)
        log_p_BS = log_p_BSV.gather(-1, ids_BS[:, 1:, None].to(log_p_BSV.device))[..., 0].cpu()
        for row, index in enumerate(batch):
            yield index, log_p_BS[row, : len(rows[index]) - 1]


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
