"""A benchmark's training file as conversations, put as `evaluate --chat` asks them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.files import overlap, replacing
from meditron_train.tasks.catalogue import Benchmark, Prompt, read_prompt
from meditron_train.tasks.formats import Item
from meditron_train.tasks.items import read_items
from meditron_train.tasks.questions import answer_of, render


@dataclass(frozen=True)
class Written:
    """What became of the rows.

    Attributes:
        num_conversations: lines written.
        num_unexplained: rows left out, as they give no reasons and reasons were asked for.
    """

    num_conversations: int
    num_unexplained: int


def write_conversations(path: Path, benchmark: Benchmark, output: Path, *, with_reasons: bool) -> Written:
    """Write the rows of a benchmark's file as JSON lines with `id` and `messages`, for `data tokenize --chat`.

    Args:
        path: in the publisher's format.
        benchmark: whose file it is.
        output: where to write; an existing file is replaced.
        with_reasons: answers give the row's explanation first, and questions ask for it, as in the mode cot.

    Raises:
        UserError: a row is not of the format, or lacks its answer; all rows lack explanations that are asked for.
    """
    if overlap(output, path):
        raise UserError(f"--output {output} would take the place of {path}, which is read: give another one")
    items = read_items(path, benchmark)
    prompt = read_prompt(benchmark.prompt, with_reasons=with_reasons)
    used = [item for item in items if item.explanation] if with_reasons else items
    if not used:
        raise UserError(
            f"{path}: none of the {len(items)} rows of {benchmark.name} explains its answer, which --cot needs (under "
            "'explanation', 'exp' or 'long_answer')"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        for line in _lines(used, prompt, with_reasons=with_reasons):
            file.write(line.encode())
    return Written(len(used), len(items) - len(used))


def _lines(items: list[Item], prompt: Prompt, *, with_reasons: bool) -> Iterator[str]:
    template = prompt.with_reasoning if with_reasons else prompt.question
    for item in items:
        messages: list[dict[str, Any]] = []
        if prompt.system:
            messages.append({"role": "system", "content": render(prompt.system, item)})
        messages += [
            {"role": "user", "content": render(template, item)},
            {"role": "assistant", "content": answer_of(item, prompt, with_reasons=with_reasons)},
        ]
        yield json.dumps({"id": item.id, "messages": messages}, ensure_ascii=False) + "\n"
