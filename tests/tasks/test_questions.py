"""Questions in words are those that the harness asks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meditron_train.evaluate.harness.lm_task import Protocol, make_task
from meditron_train.tasks.catalogue import BENCHMARKS, read_prompt
from meditron_train.tasks.formats import Item
from meditron_train.tasks.questions import question_of

pytest.importorskip("lm_eval")

ITEM = Item("1", "Which?", ("kamo", "riten", "zupa"), 1, context="Once.\nTwice.", category="college_biology")


@pytest.mark.parametrize("name", ["medqa4", "medmcqa", "pubmedqa", "truthfulqa", "mmlu", "medconceptsqa"])
def test_prompt_and_answers(name):
    benchmark = BENCHMARKS[name]
    prompt = read_prompt(benchmark.prompt)
    task = make_task(benchmark, prompt, [ITEM], [], Protocol())
    task.build_all_requests(limit=None, rank=0, world_size=1)
    asked = [instance.args for instance in task.instances]
    question = question_of(ITEM, prompt)
    assert asked == [(question.prompt, answer) for answer in question.continuations]


def test_a_template_is_compiled_once(monkeypatch):
    import jinja2

    compiled = []
    compile_one = jinja2.Environment.from_string
    monkeypatch.setattr(
        jinja2.Environment, "from_string", lambda self, text: compiled.append(text) or compile_one(self, text)
    )
    prompt = replace(
        read_prompt("options"), question="{{ question }} {{ letters[0] }}", system="{{ category }}"
    )
    asked = [question_of(replace(ITEM, question=f"{number}?"), prompt).prompt for number in range(5)]
    assert asked == [f"college_biology{number}? A" for number in range(5)]
    assert sorted(compiled) == sorted([prompt.question, prompt.system])
