"""Every format against a row in its publisher's own shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.tasks import formats
from meditron_train.tasks.catalogue import BENCHMARKS, read_prompt
from meditron_train.tasks.questions import question_of

MEDMCQA = {"question": "q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}
ROWS = [
    (
        formats.medqa,
        {"question": "q?", "options": {"A": "a", "B": "b", "C": "c", "D": "d", "E": "e"}, "answer_idx": "E"},
        (("a", "b", "c", "d", "e"), 4),
    ),
    (
        formats.medqa,
        {"id": "x", "sent1": "q?", "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d", "label": 2},
        (("a", "b", "c", "d"), 2),
    ),
    (
        formats.medmcqa,
        {"question": "q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0, "subject_name": "Anatomy"},
        (("a", "b", "c", "d"), 0),
    ),
    (
        formats.pubmedqa,
        {"QUESTION": "q?", "CONTEXTS": ["x", "y"], "final_decision": "maybe"},
        (("yes", "no", "maybe"), 2),
    ),
    (formats.mmlu, {"question": "q?", "choices": ["a", "b", "c", "d"], "answer": "B"}, (("a", "b", "c", "d"), 1)),
    (
        formats.mmlu_pro,
        {"question_id": 7, "question": "q?", "options": ["a", "b", "c", "N/A"], "answer_index": 2,
         "category": "health"},
        (("a", "b", "c"), 2),
    ),
    (
        formats.truthfulqa,
        {"question": "q?", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [0, 1, 0]}},
        (("a", "b", "c"), 1),
    ),
    (
        formats.medxpertqa,
        {"id": "T1", "question": "q?", "label": "B",
         "options": [{"letter": "B", "content": "b"}, {"letter": "A", "content": "a"}]},
        (("a", "b"), 1),
    ),
    (
        formats.careqa,
        {"question": "q?", "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 4},
        (("a", "b", "c", "d"), 3),
    ),
    (
        formats.medconceptsqa,
        {"question_id": 1, "question": "q?\nA. a\nB. b\nC. c\nD. d", "answer_id": "C",
         "option1": "a", "option2": "b", "option3": "c", "option4": "d"},
        (("a", "b", "c", "d"), 2),
    ),
    (
        formats.arc,
        {"id": "m", "question": "q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        (("a", "b", "c"), 2),
    ),
    (formats.questions, {"question": "q?", "options": ["a", "b"], "answer": "b"}, (("a", "b"), 1)),
]  # fmt: skip


@pytest.mark.parametrize(("read", "row", "expected"), ROWS)
def test_rows(read, row, expected):
    item = read(row)
    assert (item.options, item.answer) == expected
    assert item.question == "q?"


def test_more_options_than_ten():
    """As TruthfulQA has them; letters end at Z."""
    row = {
        "question": "q?",
        "mc1_targets": {"choices": [f"c{i}" for i in range(13)], "labels": [0] * 12 + [1]},
    }
    assert formats.truthfulqa(row).answer == 12
    with pytest.raises(ValueError, match="it has 27 options"):
        formats.questions({"question": "q?", "options": [str(i) for i in range(27)], "answer": 0})


def test_the_row_of_careqa_without_a_question_is_the_harnesses():
    """lm-eval asks another question in its place; the row says which option is right."""
    import importlib.util

    harness = pytest.importorskip("lm_eval.tasks")
    path = Path(harness.__file__).parent / "careqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("careqa_utils", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    row = {"question": None, "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 4}
    item = formats.careqa(row)
    question = question_of(item, read_prompt("choices"))
    assert question.prompt == theirs.doc_to_text(row) and item.answer == theirs.doc_to_target(row)


def test_medxpertqa_has_its_options_once():
    row = {"id": "T1", "label": "A", "options": {"A": "a", "B": "b"}}
    for question in ("q\nr?", "q\nr?\nAnswer Choices:", "q\nr?\nAnswer Choices: (A) a (B) b"):
        assert formats.medxpertqa({**row, "question": question}).question == "q\nr?"


def test_a_question_of_ones_own_shows_its_context():
    row = {"question": "q?", "options": ["a", "b"], "answer": 0}
    for with_reasons in (False, True):
        prompt = read_prompt(BENCHMARKS["questions"].prompt, with_reasons=with_reasons)
        plain, shown = (
            question_of(formats.questions({**row, **more}), prompt).text for more in ({}, {"context": "c."})
        )
        assert plain.startswith("Question: q?\nA. a\n") and shown == "Context: c.\n" + plain


def test_open_questions_have_a_reference():
    item = formats.medicationqa({"Question": "q?", "Answer": " as needed "})
    assert (item.options, item.reference) == ((), "as needed")


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (formats.medmcqa, {**MEDMCQA, "cop": -1}, "hidden"),
        (formats.medmcqa, {**MEDMCQA, "cop": 4}, "option 5 of 4"),
        (formats.truthfulqa, {"question": "q?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "2 true"),
        (formats.questions, {"question": "q?", "options": ["a"], "answer": 0}, "1 options"),
        (formats.pubmedqa, {"question": "q?", "contexts": ["x"], "final_decision": "perhaps"}, "perhaps|tuple"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(read, row, message):
    with pytest.raises(ValueError, match=message):
        read(row)
