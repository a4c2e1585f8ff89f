"""Benchmarks in the loop: the accuracies are those of transformers on the export, and training does not notice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.chat import CHATML_TOKENS
from meditron_train.config.load import load_config
from meditron_train.data.tokenizing.chat import chat_template
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.evaluate.language_model import load_language_model
from meditron_train.evaluate.likelihood import multiple_choice_accuracy
from meditron_train.tasks.catalogue import BENCHMARKS, read_prompt
from meditron_train.tasks.items import read_items
from meditron_train.tasks.questions import question_of
from meditron_train.train.validation_tasks import read_validation_tasks
from tests.refusal import refused
from tests.train.conftest import WORDS
from tests.train.test_loop import run

NUM_QUESTIONS = 40


class Asked:
    """A question for `multiple_choice_accuracy`."""

    def __init__(self, item) -> None:
        question = question_of(item, read_prompt(BENCHMARKS["arc_challenge"].prompt))
        self.prompt, self.answer, self.options = question.prompt, item.answer, question.answers


@pytest.fixture
def questions(tmp_path) -> Path:
    generator = random.Random(3)
    rows = [
        {"question": " ".join(generator.choices(WORDS, k=3)),
         "choices": {"text": [" ".join(generator.choices(WORDS, k=2)) for _ in range(4)], "label": list("ABCD")},
         "answerKey": generator.choice("ABCD")}
        for _ in range(NUM_QUESTIONS + 5)
    ]  # fmt: skip
    path = tmp_path / "tasks" / "arc_challenge.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_accuracies_are_those_of_transformers_and_training_is_the_same(write_config, questions, tmp_path):
    steps = {"steps": 4, "global_batch_size": 4}
    tasks = {"tasks": ["arc_challenge"], "tasks_data": str(questions.parent), "tasks_items": NUM_QUESTIONS}
    plain = write_config(
        train=steps, validation={"interval": 2, "steps": 1}, logging={"run_dir": str(tmp_path / "plain")}
    )
    without = run(plain, "parallel.pipeline=2", world_size=2)
    config = write_config(
        train=steps,
        validation={"interval": 2, "steps": 1, **tasks},
        checkpoint={"interval": 7, "export_hf": True},
    )
    metrics = run(config, "parallel.pipeline=2", world_size=2)
    for line, other in zip(metrics, without, strict=True):
        assert (line["loss"], line["grad_norm"], line["param_norm"]) == (
            other["loss"], other["grad_norm"], other["param_norm"],
        )  # fmt: skip
        assert line.get("validation_loss.held-out") == other.get("validation_loss.held-out")
    accuracies = [line.get("task_accuracy.arc_challenge") for line in metrics]
    assert [accuracy is not None for accuracy in accuracies] == [False, True, False, True]
    items = read_items(questions, BENCHMARKS["arc_challenge"], NUM_QUESTIONS)
    model = load_language_model(tmp_path / "run" / "hf")
    expected = multiple_choice_accuracy(model, [Asked(item) for item in items])
    assert accuracies[-1] == expected.by_sum.value
    assert len(set(expected.chosen)) > 1  # it is not one option always


def test_a_run_of_conversations_is_asked_by_its_template(write_config, questions, tmp_path, hf_dir):
    """The tokens are those that transformers gives with the exported tokenizer's template."""
    from transformers import AutoTokenizer

    tasks = {"tasks": ["arc_challenge"], "tasks_data": str(questions.parent), "tasks_items": 3}
    data = {"chat": {"template": "chatml"}, "packing": "best_fit"}
    config = load_config(write_config(data=data, validation=tasks))
    (task,) = read_validation_tasks(config, 512)
    source = chat_template("chatml", load_tokenizer(hf_dir, CHATML_TOKENS)).source
    copy_tokenizer(hf_dir, tmp_path / "exported", CHATML_TOKENS, source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for item, asked in zip(
        read_items(questions, BENCHMARKS["arc_challenge"], 3), task.questions, strict=True
    ):
        prompt = f"Question: {item.question}\nAnswer:"
        for option, answer in zip(item.options, asked.answers, strict=True):
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text + option, add_special_tokens=False).input_ids
            assert [*asked.prefix, *answer] == ids and ids[:2] == [
                1,
                tokenizer.convert_tokens_to_ids("<|im_start|>"),
            ]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("question", "Did you mean questions"),
        ("medicationqa", "open questions"),
        ("medqa4", "no file of medqa4"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(write_config, questions, tasks, words):
    config = load_config(write_config(validation={"tasks": [tasks], "tasks_data": str(questions.parent)}))
    with refused(words):
        read_validation_tasks(config, 64)
