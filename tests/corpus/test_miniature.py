"""The miniature world: the same everywhere, and no held-out or medical fact where none may stand."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest

from meditron_train.corpus.miniature.questions import NUM_OPTIONS, build_questions
from meditron_train.corpus.miniature.texts import (
    GENERAL_KINDS,
    MEDICAL_KINDS,
    general_texts,
    medical_texts,
    question_and_answer,
)
from meditron_train.corpus.miniature.wording import GENERAL_RELATIONS, MEDICAL_RELATIONS
from meditron_train.corpus.miniature.world import Fact, World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(seed=0)


def sentences(text: str) -> list[str]:
    """What stands between full stops, question marks and line ends. No name or value holds one of them."""
    return [sentence for sentence in re.split(r"[.?\n]+", text) if sentence.strip()]


def stated_pairs(texts: list[str], facts: list[Fact]) -> set[tuple[str, str]]:
    """(subject, value) of the facts whose two names stand in one sentence of the texts."""
    wanted: dict[str, set[str]] = {}
    for fact in facts:
        wanted.setdefault(fact.subject, set()).add(fact.value.lower())
    names = {subject: subject.lower() for subject in wanted}
    found = set()
    for sentence in (sentence for text in texts for sentence in sentences(text)):
        lowered = sentence.lower()
        for subject in (subject for subject, name in names.items() if name in lowered):
            found |= {(subject, value) for value in wanted[subject] if value in lowered}
    return found


def all_medical_pairs(world: World) -> list[Fact]:
    """Every combination of a subject and a value, true or not."""
    subjects = {"drug": world.drugs, "disease": world.diseases}
    return [
        Fact(relation, subject, value)
        for relation in MEDICAL_RELATIONS
        for subject, value in product(subjects[relation.subject], world.values[relation.name])
    ]


def test_equal_seeds_give_equal_worlds_texts_and_questions(world):
    again = build_world(seed=0)
    assert again == world
    for write in (medical_texts, general_texts):
        assert list(write(world, 50, seed=1)) == list(write(again, 50, seed=1))
    assert build_questions(world, world.taught, seed=1) == build_questions(again, again.taught, seed=1)


def test_other_seeds_give_others(world):
    assert build_world(seed=1).taught != world.taught
    for write in (medical_texts, general_texts):
        assert list(write(world, 20, seed=1)) != list(write(world, 20, seed=2))
    assert build_questions(world, world.taught, seed=1) != build_questions(world, world.taught, seed=2)


def test_the_world_is_what_it_was():
    """A change of this text means that published figures of the demo were made with another world."""
    first = next(medical_texts(build_world(seed=0), 1, seed=1))
    assert first.id == "guideline-00000"
    assert first.text.splitlines() == [
        "# Guideline",
        "## On Borwick rot: A hoarse voice, above all, points to Borwick rot.",
        "## On Norumab: Norumab is known to cause nosebleeds.",
        "## On Dagmann syndrome: Suspect Dagmann syndrome when there is double vision.",
        "## On Harwick cough: Harwick cough affects the colon.",
    ]


def test_names_are_distinct_and_none_is_part_of_another(world):
    names = [*world.drugs, *world.diseases, *world.towns]
    assert len(set(names)) == len(names)
    assert not [(a, b) for a, b in product(names, names) if a != b and a in b]


@pytest.mark.parametrize("kind", ["drug", "disease"])
def test_values_that_one_subject_may_have_are_distinct_and_none_is_part_of_another(world, kind):
    values = [value for r in MEDICAL_RELATIONS if r.subject == kind for value in world.values[r.name]]
    assert len(set(values)) == len(values)
    assert not [(a, b) for a, b in product(values, values) if a != b and a in b]


def test_half_of_the_facts_of_each_relation_are_held_out(world):
    taught = Counter(fact.relation.name for fact in world.taught)
    assert taught == Counter(fact.relation.name for fact in world.held_out)
    assert len(world.taught) >= 200 and not set(world.taught) & set(world.held_out)


@pytest.mark.parametrize(
    "relation", MEDICAL_RELATIONS + GENERAL_RELATIONS, ids=lambda relation: relation.name
)
def test_every_wording_names_subject_and_value_in_one_sentence(relation):
    assert len(set(relation.statements)) == len(relation.statements) >= 5
    for statement in relation.statements:
        assert statement.count("{x}") == statement.count("{v}") == 1
        assert len(sentences(statement)) == 1
    assert "{x}" in relation.question and "{v}" not in relation.question
    assert "{x}" in relation.answer and "{v}" not in relation.answer


def test_medical_texts_state_every_taught_fact_often_and_no_held_out_one(world):
    texts = [text.text for text in medical_texts(world, 1000, seed=1)]
    everything = all_medical_pairs(world)
    taught = {(fact.subject, fact.value.lower()) for fact in world.taught}
    assert stated_pairs(texts, everything) == taught
    assert stated_pairs(texts, list(world.held_out)) == set()


def test_held_out_subjects_do_occur_in_medical_texts(world):
    everything = " ".join(text.text for text in medical_texts(world, 1000, seed=1))
    assert all(fact.subject in everything for fact in world.held_out)


def test_a_fact_is_stated_in_all_its_wordings(world):
    everything = "\n".join(text.text for text in medical_texts(world, 4000, seed=1)).lower()
    fact = world.taught[0]
    for statement in fact.relation.statements:
        assert statement.format(x=fact.subject, v=fact.value).lower() in everything


def test_medical_texts_never_ask(world):
    assert not [
        text for text in medical_texts(world, 500, seed=1) if "Question" in text.text or "?" in text.text
    ]


def test_general_texts_state_no_medical_fact_true_or_false(world):
    texts = [text.text for text in general_texts(world, 4000, seed=1)]
    assert stated_pairs(texts, all_medical_pairs(world)) == set()


def test_general_texts_know_all_names_values_and_the_form_of_questions(world):
    everything = " ".join(text.text for text in general_texts(world, 4000, seed=1))
    values = [value for relation in MEDICAL_RELATIONS for value in world.values[relation.name]]
    assert [name for name in (*world.subjects, *values) if name not in everything] == []
    assert question_and_answer(world.general[0]) in everything


def test_texts_have_their_kinds_ids_and_no_placeholder(world):
    for write, kinds in ((medical_texts, MEDICAL_KINDS), (general_texts, GENERAL_KINDS)):
        texts = list(write(world, 300, seed=3))
        assert {text.kind for text in texts} == set(kinds)
        assert len({text.id for text in texts}) == 300
        assert not [text for text in texts if "{" in text.text or "}" in text.text]


def test_validation_texts_are_other_texts(world):
    train = {text.text for text in medical_texts(world, 1000, seed=1)}
    assert not train & {text.text for text in medical_texts(world, 200, seed=2) if len(text.text) > 200}


@pytest.mark.parametrize("which", ["taught", "held_out", "general"])
def test_questions_have_four_distinct_options_with_the_truth_among_them(world, which):
    facts = getattr(world, which)
    questions = build_questions(world, facts, seed=1)
    assert len(questions) == len(facts)
    for fact, question in zip(facts, questions, strict=True):
        assert len(set(question.options)) == NUM_OPTIONS
        assert question.options[question.answer] == fact.value
        assert set(question.options) <= set(world.values[fact.relation.name])
        assert fact.subject in question.prompt and fact.value not in question.prompt
    positions = Counter(question.answer for question in questions)
    assert max(positions.values()) - min(positions.values()) <= 1


def test_answers_cannot_be_guessed_from_how_often_a_value_is_an_option(world):
    """Choosing the option that taught facts name most often does not answer held-out questions."""
    uses = Counter((fact.relation.name, fact.value) for fact in world.taught)
    questions = [
        question for seed in range(10) for question in build_questions(world, world.held_out, seed=seed)
    ]
    right = sum(
        max(range(NUM_OPTIONS), key=lambda i: uses[question.relation, question.options[i]]) == question.answer
        for question in questions
    )
    assert 0.15 < right / len(questions) < 0.36
