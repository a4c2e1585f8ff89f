"""The benchmarks that `evaluate --tasks` knows.

Prompts are templates in prompts.yaml beside this file. The files of a benchmark are looked for under --data as
NAME.jsonl, NAME.json or NAME.parquet, or as NAME/test.* (and NAME/train.* for examples to show); where a benchmark is
scored on its validation split, as NAME/validation.* first.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meditron_train.errors import UserError
from meditron_train.tasks import formats
from meditron_train.tasks.formats import LETTERS, Item

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
_MMLU_MEDICAL = (
    *("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics"),
    *("professional_medicine", "high_school_biology", "virology", "nutrition"),
)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and where its questions are.

    Attributes:
        name: of its files and on the command line.
        prompt: key of prompts.yaml.
        categories: only items of these; all when empty.
        split: that the benchmark is scored on.
        column: of the published tables, where there is one.
        is_open: answers are texts, not scored here.
    """

    name: str
    title: str
    format: formats.Format
    prompt: str = "options"
    categories: tuple[str, ...] = ()
    file: str | None = None
    split: str = "test"
    column: str | None = None
    is_open: bool = False

    @property
    def file_name(self) -> str:
        return self.file or self.name


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("medqa4", "MedQA (USMLE), 4 options", formats.medqa, column="MedQA-4"),
        Benchmark("medqa5", "MedQA (USMLE), 5 options", formats.medqa, column="MedQA"),
        Benchmark(
            "medmcqa",
            "MedMCQA, validation",
            formats.medmcqa,
            prompt="choices",
            split="validation",
            column="MedMCQA",
        ),
        Benchmark(
            "pubmedqa", "PubMedQA, 500 labeled", formats.pubmedqa, prompt="pubmedqa", column="PubMedQA"
        ),
        Benchmark(
            "mmlu_medical",
            "MMLU, the nine medical subjects of Chen et al. 2023",
            formats.mmlu,
            prompt="mmlu",
            categories=_MMLU_MEDICAL,
            file="mmlu",
            column="MMLU-Medical",
        ),
        Benchmark("mmlu", "MMLU, all subjects", formats.mmlu, prompt="mmlu"),
        Benchmark(
            "truthfulqa",
            "TruthfulQA, one true answer (MC1)",
            formats.truthfulqa,
            prompt="truthfulqa",
            split="validation",
        ),
        Benchmark(
            "medicationqa", "MedicationQA, open questions", formats.medicationqa, prompt="open", is_open=True
        ),
        Benchmark("medxpertqa", "MedXpertQA, text, 10 options", formats.medxpertqa),
        Benchmark("careqa", "CareQA, closed", formats.careqa, prompt="choices"),
        Benchmark(
            "mmlu_pro_health", "MMLU-Pro, health", formats.mmlu_pro, categories=("health",), file="mmlu_pro"
        ),
        Benchmark("medconceptsqa", "MedConceptsQA", formats.medconceptsqa, prompt="medconceptsqa"),
        Benchmark("arc_challenge", "ARC, challenge set (general retention)", formats.arc, prompt="arc"),
        Benchmark("questions", "your own questions: question, options, answer", formats.questions),
    )
}


@dataclass(frozen=True)
class Prompt:
    """Jinja templates over the fields of an item and `letters`.

    Attributes:
        question: ends where the answer begins.
        answer_with: "letter" or "text" of an option.
        cot: the instruction to reason; it asks for a last line that `answer_pattern` finds.
        answer_pattern: regular expression; the answer is its one group that takes part in the match.
        system: stands once, before examples and question; by a chat template, as the system's message.
    """

    question: str
    answer_with: str
    cot: str
    answer_pattern: str
    system: str = ""

    @property
    def with_reasoning(self) -> str:
        """The question without its closing "Answer:", then the instruction to reason."""
        question = self.question.rstrip()
        return question.removesuffix("Answer:").rstrip() + "\n" + self.cot + "\nAnswer:"


def find_benchmarks(names: str) -> list[Benchmark]:
    """Benchmarks of a comma-separated list.

    Raises:
        UserError: a name is unknown; names the nearest known one.
    """
    found = []
    for name in (part.strip() for part in names.split(",")):
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"the task {name!r} is unknown.{hint} Known are {', '.join(BENCHMARKS)}")
        found.append(BENCHMARKS[name])
    return found


def read_prompt(key: str, *, with_reasons: bool = False) -> Prompt:
    """The prompt of that key in prompts.yaml.

    Args:
        key: of a benchmark.
        with_reasons: the model reasons before it answers; so the options are before it, also where a likelihood needs
            the question alone.
    """
    content: dict[str, dict[str, Any]] = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))
    values = {**content["defaults"], **content[key]}
    reasoning = values.pop("reasoning", None)
    if with_reasons and reasoning is not None:
        return read_prompt(reasoning)
    return Prompt(**values)


def template_fields(item: Item) -> dict[str, Any]:
    """What the templates of a prompt may name."""
    return {
        "id": item.id,
        "question": item.question,
        "context": item.context,
        "category": item.category,
        "options": list(item.options),
        "letters": list(LETTERS[: len(item.options)]),
        "answer": item.answer,
    }
