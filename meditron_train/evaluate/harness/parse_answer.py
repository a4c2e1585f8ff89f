"""Answers read from generated texts; the patterns are in tasks/prompts.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence

from meditron_train.tasks.catalogue import Prompt
from meditron_train.tasks.formats import LETTERS


def parse_answer(text: str, prompt: Prompt, options: Sequence[str]) -> int | None:
    """The option that a generated text ends with, by the prompt's pattern; None where there is none, or no such
    option. Of several, the last counts: reasoning may weigh others before."""
    found = list(re.finditer(prompt.answer_pattern, text))
    if not found:
        return None
    answer = found[-1][found[-1].lastindex or 0]
    if prompt.answer_with == "text":
        texts = [option.lower().rstrip(".") for option in options]
        answer = answer.lower().rstrip(".")
        return texts.index(answer) if answer in texts else None
    number = LETTERS.index(answer.upper())
    return number if number < len(options) else None
