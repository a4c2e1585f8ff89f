"""An item as a question in words: what stands before the answer, and the answers among which the model chooses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from meditron_train.tasks.catalogue import Prompt, template_fields
from meditron_train.tasks.formats import LETTERS, Item


@dataclass(frozen=True)
class Question:
    """What is asked, and the answers to choose from.

    Attributes:
        system: what stands before the question; by a chat template, the system's message.
        text: ends where the answer begins.
        answers: with no space before them.
    """

    system: str
    text: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """As text."""
        return self.system + self.text

    @property
    def continuations(self) -> tuple[str, ...]:
        """The answers as they continue the text."""
        return tuple(f" {answer}" for answer in self.answers)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation that ends with the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


def render(template: str, item: Item) -> str:
    """A template of a prompt with the fields of an item, as the lm-evaluation-harness renders it."""
    return str(_compiled(template).render(template_fields(item)))


@cache
def _compiled(template: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)


def question_of(item: Item, prompt: Prompt) -> Question:
    """The item with no example before it, as the harness puts it for a choice by likelihood."""
    fields = template_fields(item)
    answers = fields["letters"] if prompt.answer_with == "letter" else fields["options"]
    return Question(render(prompt.system, item), render(prompt.question, item), tuple(answers))


def answer_of(item: Item, prompt: Prompt, *, with_reasons: bool = False) -> str:
    """The right answer in words, as examples show it and finetuning teaches it.

    Args:
        item: with its explanation, where reasons are asked for.
        prompt: what it answers.
        with_reasons: the explanation comes first, and the answer as the instruction to reason wants it.
    """
    if item.reference:
        return item.reference
    answer = LETTERS[item.answer] if prompt.answer_with == "letter" else item.options[item.answer]
    return f"{item.explanation}\nThe answer is {answer}." if with_reasons else answer
