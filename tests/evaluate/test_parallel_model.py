"""The model on ranks gives the log-likelihoods and logits of transformers, each text read alone, in every layout; also
where the text grows token by token."""

from __future__ import annotations

import random

import pytest
import torch

from meditron_train.evaluate.language_model import LanguageModel, load_language_model
from tests.distributed import run_ranks
from tests.evaluate.models import write_tiny_model
from tests.evaluate.ranks import ask
from tests.long import mostly_long

# (ranks, layout, tokens of a micro-batch: 24 are several, 1000 one)
LAYOUTS = {
    "one": (1, {}, 1000),
    "tp2": (2, {"tensor": 2}, 24),
    "pp2": (2, {"pipeline": 2}, 24),
    "dp2": (2, {}, 24),
    "tp2-sp-pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 1000),
    "pp2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}, 24),
    "cp2": (2, {"context": 2}, 24),
}


def make_questions(vocab_size: int) -> list:
    generator = random.Random(5)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, vocab_size) for _ in range(length))

    shapes = [(1, (1,)), (5, (1, 1, 1, 1)), (9, (3, 1, 4, 2)), (20, (2, 2)), (3, (7,)), (12, (1, 5, 1))]
    return [(tokens(length), tuple(map(tokens, answers))) for length, answers in shapes]


def expected_scores(model: LanguageModel, questions: list) -> dict[int, list[tuple[float, bool]]]:
    """By transformers, one text at a time, in float64."""
    found = {}
    for number, (prefix, answers) in enumerate(questions):
        found[number] = []
        for answer in answers:
            log_p_SV = model.logits(torch.tensor([[*prefix, *answer]]))[0].double().log_softmax(-1)
            rows_AV = log_p_SV[len(prefix) - 1 : -1]
            nats = float(rows_AV.gather(1, torch.tensor(answer)[:, None]).sum())
            found[number].append((nats, rows_AV.argmax(-1).tolist() == list(answer)))
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("parallel") / "model", num_hidden_layers=4)
    model = load_language_model(directory)
    questions = make_questions(model.model.config.vocab_size)
    # One answer is what the model itself would say: not all are "not greedy".
    prefix, answers = questions[2]
    ids = list(prefix)
    for _ in range(3):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    questions[2] = (prefix, (tuple(ids[len(prefix) :]), *answers[1:]))
    return directory, questions, expected_scores(model, questions), model


@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, "one", "dp2", "tp2-sp-pp2", "cp2"))
def test_every_layout_agrees_with_transformers(tiny, layout):
    directory, questions, expected, model = tiny
    world_size, parallel, max_tokens = LAYOUTS[layout]
    for scores, logits in run_ranks(ask, world_size, directory, parallel, questions, max_tokens):
        assert scores.keys() == logits.keys() == expected.keys()
        for number, wanted in expected.items():
            assert [nats for nats, _ in scores[number]] == pytest.approx([n for n, _ in wanted], abs=1e-5)
            assert [greedy for _, greedy in scores[number]] == [greedy for _, greedy in wanted]
            prefix, (answer, *_) = questions[number]
            each_SV = model.logits(torch.tensor([[*prefix, *answer]]))[0, len(prefix) - 1 :]
            assert (torch.tensor(logits[number]) - each_SV).abs().max() <= 1e-5
    assert sum(greedy for found in expected.values() for _, greedy in found) >= 1
