"""Rows of public benchmark files to items of one shape.

Each function reads one row as its publisher distributes it (JSON object or Parquet row). `read_items` says
which row of which file was wrong.

Raises:
    KeyError, TypeError, ValueError: the row is not of that format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        options: of a multiple choice, else empty.
        answer: index of the right option.
        context: text that the question is about.
        category: subject, where the file says.
        reference: the answer text of an open question.
        explanation: why the answer is right, where the file says.
    """

    id: str
    question: str
    options: tuple[str, ...] = ()
    answer: int = 0
    context: str = ""
    category: str = ""
    reference: str = ""
    explanation: str = ""


Format = Callable[[Row], Item]


def choice_item(
    row: Row, question: object, options: Sequence[object], answer: int, *, id_key: str = "id", **more: str
) -> Item:
    """An item whose parts are checked: text that is not empty, an answer among the options.

    Raises:
        ValueError: the text is empty, there are fewer than two options or more than letters, or the answer is not one
            of them.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"it has {len(options)} options")
    texts = tuple(_text(option, f"option {LETTERS[i]}") for i, option in enumerate(options))
    if not 0 <= answer < len(texts):
        raise ValueError(f"its answer is option {answer + 1} of {len(texts)}")
    explanation = _explanation(row.get("explanation") or row.get("exp"))
    return Item(
        str(row.get(id_key, "")), _text(question, "question"), texts, answer, explanation=explanation, **more
    )


def medqa(row: Row) -> Item:
    """MedQA, with 4 or 5 options: `options` {letter: text} and `answer_idx` (Jin et al. 2020); or sent1, ending0 … and
    label, as the version for multiple-choice heads has them."""
    if "sent1" in row:
        endings = [row[f"ending{i}"] for i in range(4)]
        return choice_item(row, row["sent1"], endings, int(row["label"]))
    options = row["options"]
    letters = sorted(letter for letter, text in options.items() if text is not None)
    return choice_item(
        row, row["question"], [options[letter] for letter in letters], letters.index(row["answer_idx"])
    )


def medmcqa(row: Row) -> Item:
    """MedMCQA (Pal et al. 2022) as on the Hub: opa … opd, cop from 0. The original JSON counts from 1: convert it."""
    if int(row["cop"]) < 0:
        raise ValueError("its answer is hidden (cop -1): this is the test split; use the validation split")
    options = [row[f"op{letter}"] for letter in "abcd"]
    return choice_item(
        row, row["question"], options, int(row["cop"]), category=str(row.get("subject_name") or "")
    )


PUBMEDQA_OPTIONS = ("yes", "no", "maybe")


def pubmedqa(row: Row) -> Item:
    """PubMedQA, labeled (Jin et al. 2019): the Hub's rows (question, context.contexts), or the original's (QUESTION,
    CONTEXTS)."""
    lower = {str(key).lower(): value for key, value in row.items()}
    contexts = lower["contexts"] if "contexts" in lower else lower["context"]["contexts"]
    answer = PUBMEDQA_OPTIONS.index(lower["final_decision"])
    item_id = str(lower.get("pubid", lower.get("id", "")))
    context = "\n".join(_text(part, "context") for part in contexts)
    explanation = _explanation(lower.get("long_answer"))
    question = _text(lower["question"], "question")
    return Item(item_id, question, PUBMEDQA_OPTIONS, answer, context, explanation=explanation)


def mmlu(row: Row) -> Item:
    """MMLU (Hendrycks et al. 2021): choices and answer, an index or a letter."""
    answer = row["answer"]
    index = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    return choice_item(row, row["question"], row["choices"], index, category=str(row.get("subject") or ""))


def mmlu_pro(row: Row) -> Item:
    """MMLU-Pro (Wang et al. 2024): up to ten options, answer_index."""
    options = [option for option in row["options"] if option != "N/A"]
    return choice_item(
        row,
        row["question"],
        options,
        int(row["answer_index"]),
        id_key="question_id",
        category=str(row["category"]),
    )


def truthfulqa(row: Row) -> Item:
    """TruthfulQA, one true answer (Lin et al. 2022, MC1)."""
    targets = row["mc1_targets"]
    labels = [int(label) for label in targets["labels"]]
    if sum(labels) != 1:
        raise ValueError(f"mc1_targets has {sum(labels)} true answers")
    return choice_item(row, row["question"], targets["choices"], labels.index(1))


def medicationqa(row: Row) -> Item:
    """MedicationQA (Ben Abacha et al. 2019): open questions with a reference answer."""
    lower = {str(key).lower(): value for key, value in row.items()}
    return Item(
        str(lower.get("id", "")),
        _text(lower["question"], "question"),
        reference=_text(lower["answer"], "answer"),
    )


def medxpertqa(row: Row) -> Item:
    """MedXpertQA, text (Zuo et al. 2025): options as {letter: text} or a list of {letter, content}; label.
    `question` may end with "Answer Choices:" and the options once more."""
    options, question = row["options"], row["question"]
    if isinstance(question, str) and "\nAnswer Choices:" in question:
        question = question.rpartition("\nAnswer Choices:")[0]
    if not isinstance(options, Mapping):
        options = {option["letter"]: option["content"] for option in options}
    letters = sorted(letter for letter, text in options.items() if text is not None)
    category = str(row.get("medical_task") or "")
    return choice_item(
        row,
        question,
        [options[letter] for letter in letters],
        letters.index(row["label"]),
        category=category,
    )


def careqa(row: Row) -> Item:
    """CareQA, closed (Arias-Duart et al. 2025): op1 … op4, cop from 1. One published row has lost its question."""
    if row["question"] is None:
        row = {**row, **_CAREQA_LOST}
    options = [row[f"op{number}"] for number in range(1, 5)]
    return choice_item(
        row,
        row["question"],
        options,
        int(row["cop"]) - 1,
        id_key="unique_id",
        category=str(row.get("category") or ""),
    )


# What the lm-evaluation-harness (MIT license) asks in place of a question that is null.
_CAREQA_LOST = {
    "question": "In relation to the immune mechanism involved in the rejection of transplanted solid organs, indicate "
    "the incorrect answer:",
    "op1": "Acute T-cell mediated rejection can be controlled through the use of drugs such as cyclosporine A or "
    "corticosteroids.",
    "op2": "The presence of specific antibodies against the donor (DSA) in the recipient prior to transplantation is a "
    "contraindication for it.",
    "op3": "Chronic rejection or chronic graft injury is associated with endothelial damage mediated by anti-HLA "
    "antibodies.",
    "op4": "Hyperacute rejection is mediated by cytotoxic T lymphocytes against donor antigens present in the "
    "recipient.",
}


def medconceptsqa(row: Row) -> Item:
    """MedConceptsQA (Shoham & Rappoport 2024): option1 … option4, answer_id a letter. `question` has the options once
    more, on lines of their own."""
    options = [row[f"option{number}"] for number in range(1, 5)]
    question, _, _ = row["question"].strip().partition("\n")
    return choice_item(row, question, options, LETTERS.index(row["answer_id"]), id_key="question_id")


def arc(row: Row) -> Item:
    """ARC (Clark et al. 2018): choices.text, choices.label, answerKey."""
    labels = list(row["choices"]["label"])
    return choice_item(row, row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def questions(row: Row) -> Item:
    """Your own questions: question, options (a list), answer (an index from 0, or the text of an option); context,
    which is shown before the question, where there is some."""
    options, answer = list(row["options"]), row["answer"]
    index = options.index(answer) if isinstance(answer, str) else int(answer)
    return choice_item(row, row["question"], options, index, context=str(row.get("context") or ""))


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {what} is {'empty' if value in (None, '') else f'{value!r:.40}'}")
    return value.strip()


def _explanation(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def rows_of(content: Any) -> Iterator[Row]:
    """Rows of a parsed JSON file: a list of objects, or PubMedQA's object of objects by id.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(content, Mapping) and all(isinstance(value, Mapping) for value in content.values()):
        content = [{"id": key, **value} for key, value in content.items()]
    if not isinstance(content, list):
        raise ValueError("it is neither a list of objects nor an object of objects")
    yield from content
