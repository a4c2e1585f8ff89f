"""Multiple-choice questions about the facts of the miniature world."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from meditron_train.corpus.miniature.texts import question_prompt
from meditron_train.corpus.miniature.world import Fact, World

NUM_OPTIONS = 4


@dataclass(frozen=True)
class Question:
    """`options[answer]` continues `prompt` truly; the others are values of the same relation."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    relation: str


def build_questions(world: World, facts: Iterable[Fact], *, seed: int) -> list[Question]:
    """One question for each fact, its answer equally often (within one) in each of the four positions."""
    random = Random(f"questions {world.seed} {seed}")
    facts = list(facts)
    positions = [number % NUM_OPTIONS for number in range(len(facts))]
    random.shuffle(positions)
    questions = []
    for fact, position in zip(facts, positions, strict=True):
        others = [value for value in world.values[fact.relation.name] if value != fact.value]
        options = random.sample(others, NUM_OPTIONS - 1)
        options.insert(position, fact.value)
        questions.append(Question(question_prompt(fact), tuple(options), position, fact.relation.name))
    return questions
