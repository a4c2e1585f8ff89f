"""Likelihoods against a loop that feeds one more token at a time, and accuracies by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from meditron_train.evaluate.language_model import LanguageModel
from meditron_train.evaluate.likelihood import (
    Accuracy,
    multiple_choice_accuracy,
    perplexity,
    score_continuations,
)
from tests.checkpoint.tiny_tokenizer import generated_texts
from tests.refusal import refused


@dataclass(frozen=True)
class Asked:
    prompt: str
    options: tuple[str, ...]
    answer: int


def naive_log_likelihood(model, prefix: list[int], continuation: list[int]) -> float:
    """One forward pass per token, in float64."""
    total = 0.0
    network = model.model.double()
    try:
        for token in continuation:
            with torch.no_grad():
                logits = network(torch.tensor([prefix])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            prefix = [*prefix, token]
    finally:
        model.model.float()
    return total


def score_options(model, prompt, options, *, batch_size=64):
    return score_continuations(model, [(prompt, option) for option in options], batch_size)


def questions(number: int) -> list[Asked]:
    texts = generated_texts(number * 5, seed=3)
    return [
        Asked(texts[5 * i], tuple(text[:20].strip() for text in texts[5 * i + 1 : 5 * i + 5]), i % 4)
        for i in range(number)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_the_naive_loop(model, batch_size):
    prompt = "Question: kamori ten?\nAnswer: zupa"
    options = ("lex", "orindex ta vi", "12 mg", "ßé unknown 漢", "rone")
    scores = score_options(model, prompt, options, batch_size=batch_size)
    prefix = model.tokenizer.encode(prompt)
    assert prefix[0] == model.tokenizer.bos_token_id
    for option, score in zip(options, scores, strict=True):
        ids = model.tokenizer.encode(f"{prompt} {option}")
        assert ids[: len(prefix)] == prefix and score.num_tokens == len(ids) - len(prefix)
        want = naive_log_likelihood(model, prefix, ids[len(prefix) :])
        assert score.log_likelihood == pytest.approx(want, rel=1e-5)
        assert score.num_bytes == len(option.encode())
        assert score.normalized == pytest.approx(want / len(option.encode()), rel=1e-5)


class PairTokenizer:
    """Two characters make a token, from the left: where the prompt ends decides how it is cut."""

    def encode(self, text: str) -> list[int]:
        return [1, *(10 + sum(map(ord, text[i : i + 2])) % 300 for i in range(0, len(text), 2))]


def test_a_token_across_the_boundary_counts_for_the_option(model):
    paired = LanguageModel(model.model, PairTokenizer())
    (score,) = score_options(paired, "abc", ["def"])  # [BOS] ab c | [BOS] ab c_ de f
    ids = paired.tokenizer.encode("abc def")
    assert score.num_tokens == 3
    assert score.log_likelihood == pytest.approx(naive_log_likelihood(model, ids[:2], ids[2:]), rel=1e-5)


def test_accuracy_counts_the_likeliest_options(model):
    asked = questions(12)
    result = multiple_choice_accuracy(model, asked, batch_size=7)
    by_sum = by_bytes = 0
    for question, chosen in zip(asked, result.chosen, strict=True):
        scores = score_options(model, question.prompt, question.options)
        sums = [score.log_likelihood for score in scores]
        assert chosen == sums.index(max(sums))
        by_sum += chosen == question.answer
        normalized = [score.normalized for score in scores]
        by_bytes += normalized.index(max(normalized)) == question.answer
    assert (result.by_sum.num_correct, result.by_normalized.num_correct) == (by_sum, by_bytes)
    assert result.by_sum.num_questions == 12 and result.chance == pytest.approx(0.25)


def test_chance_follows_the_number_of_options(model):
    asked = [Asked("ka", ("mo", "ri"), 0), Asked("ka", ("mo", "ri", "ten", "zu"), 0)]
    assert multiple_choice_accuracy(model, asked).chance == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize(("correct", "number"), [(50, 200), (196, 200), (1, 3), (0, 10), (10, 10)])
def test_the_interval_ends_where_the_score_test_rejects(correct, number):
    """Wilson's interval holds the proportions that are at most 1.96 of their own standard errors away."""
    share = correct / number
    for end in Accuracy(number, correct).interval:
        if abs(end - share) > 1e-12:  # all right or all wrong: one end is the share itself
            distance = abs(share - end) / math.sqrt(end * (1 - end) / number)
            assert distance == pytest.approx(1.959964, rel=1e-6)
        else:
            assert correct in (0, number)


def test_perplexity_equals_the_naive_loop(model):
    documents = [model.tokenizer.encode(text) for text in generated_texts(5, seed=9)]
    total = sum(naive_log_likelihood(model, ids[:1], ids[1:]) for ids in documents)
    want = math.exp(-total / sum(len(ids) - 1 for ids in documents))
    assert perplexity(model, documents, batch_size=2) == pytest.approx(want, rel=1e-5)


def test_perplexity_reads_no_further_than_the_model_can(model):
    ids = [1, *[5 + i % 200 for i in range(model.max_num_tokens + 30)]]
    assert perplexity(model, [ids]) == perplexity(model, [ids[: model.max_num_tokens]])


def test_bad_input(model):
    with refused("no questions"):
        multiple_choice_accuracy(model, [])
    with refused("question 0", "2 options", "answer is 2"):
        multiple_choice_accuracy(model, [Asked("ka", ("mo", "ri"), 2)])
    with refused("empty", "'ka'"):
        score_options(model, "ka", ["mo", " "])
    with refused("at most 64"):
        score_options(model, "ka mo " * 100, ["ri"])
    with refused("every document is empty"):
        perplexity(model, [[1], []])
