"""The texts of the miniature world: guidelines, abstracts and papers; and general text without a medical fact.

A medical text is about several drugs and diseases. It tells each of their taught facts in a sentence of its own, and
pads them with sentences that state nothing. General text tells of towns, asks and answers questions about some
of them, drops medical names and values one to a sentence, and spells the words of medicine: a reader of it knows how
medical text and questions sound, and nothing of what they say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from meditron_train.corpus.miniature.wording import MEDICAL_RELATIONS
from meditron_train.corpus.miniature.world import Fact, World

MEDICAL_KINDS = ("guideline", "abstract", "paper")
GENERAL_KINDS = ("chronicle", "questions", "questions", "gossip", "spelling")

CLOSING_REMARKS = (
    "More studies are needed.",
    "The committee agreed on this by vote.",
    "Review this advice in two years.",
    "The authors report no conflict of interest.",
    "Follow-up lasted one year.",
    "Ask a colleague when in doubt.",
)
METHODS = (
    "We followed {n} adults with a history of {x}.",
    "{n} people with a record of {x} were enrolled.",
    "Two readers went through {n} reports on {x}.",
    "We searched the registers for {x} and found {n} cases.",
)
GUIDELINE_TITLES = (
    "Guideline",
    "Advice for daily practice",
    "Recommendations of the committee",
    "Standard of care",
)
STUDY_TITLES = ("A study of {x}", "{x} revisited", "What we know about {x}", "Notes on {x}")
IDLE_MENTIONS = (
    "An old poster about {x} hung in the hall.",
    "Somebody had written {x} on the wall.",
    "The word on everybody's lips was {x}.",
    "The schoolmaster could not spell {x}.",
    "There was a crossword in the paper, and the answer was {x}.",
    "A letter arrived that spoke of {x} and little else.",
)
TOWN_IDLE = (
    "The winter was long.",
    "The road north was closed for a month.",
    "A new roof was put on the hall.",
    "Nobody could remember a better harvest.",
    "The old clock stopped and was mended.",
)


@dataclass(frozen=True)
class Text:
    """One document: `kind` is guideline, abstract, paper, chronicle, questions, gossip or spelling."""

    id: str
    kind: str
    text: str


def medical_texts(world: World, num_texts: int, *, seed: int) -> Iterator[Text]:
    """Guidelines, abstracts and papers, each subject equally often; the same arguments give the same texts."""
    random = Random(f"medical {world.seed} {seed}")
    writers = {"guideline": (_guideline, 4), "abstract": (_abstract, 2), "paper": (_paper, 6)}
    waiting: list[str] = []
    for number in range(num_texts):
        kind = random.choice(MEDICAL_KINDS)
        write, num_subjects = writers[kind]
        if len(waiting) < num_subjects:
            waiting += random.sample(world.subjects, len(world.subjects))
        subjects, waiting = waiting[:num_subjects], waiting[num_subjects:]
        yield Text(f"{kind}-{number:05d}", kind, write(random, world, subjects))


def general_texts(world: World, num_texts: int, *, seed: int) -> Iterator[Text]:
    """Town chronicles, questions with answers, gossip and spelling lessons; none states a medical fact."""
    random = Random(f"general {world.seed} {seed}")
    named = [*world.drugs, *world.diseases, *_medical_values(world)]
    words = _medical_words()
    for number in range(num_texts):
        kind = random.choice(GENERAL_KINDS)
        if kind == "chronicle":
            text = _chronicle(random, world)
        elif kind == "questions":
            text = "\n\n".join(question_and_answer(fact) for fact in random.sample(world.general, 4))
        elif kind == "gossip":
            text = " ".join(random.choice(IDLE_MENTIONS).format(x=name) for name in random.sample(named, 5))
        else:
            text = f"Spelling lesson: {', '.join(random.sample(words, 12))}."
        yield Text(f"{kind}-{number:05d}", kind, text)


def question_prompt(fact: Fact) -> str:
    """The question about a fact and the beginning of its answer, up to the value."""
    answer = fact.relation.answer.format(x=fact.subject)
    return (
        f"Question: {fact.relation.question.format(x=fact.subject)}\nAnswer: {answer[0].upper()}{answer[1:]}"
    )


def question_and_answer(fact: Fact) -> str:
    """The question about a fact with its whole answer."""
    return f"{question_prompt(fact)} {fact.value}."


def state(random: Random, fact: Fact) -> str:
    """One sentence that states a fact, in a wording chosen at random."""
    sentence = random.choice(fact.relation.statements).format(x=fact.subject, v=fact.value)
    return sentence[0].upper() + sentence[1:]


def _guideline(random: Random, world: World, subjects: list[str]) -> str:
    sections = [f"## On {subject}: {_tell(random, world, subject)}" for subject in subjects]
    return "\n".join([f"# {random.choice(GUIDELINE_TITLES)}", *sections])


def _abstract(random: Random, world: World, subjects: list[str]) -> str:
    methods = _worded(random, METHODS, subjects[0])
    return " ".join(
        [methods, *(_tell(random, world, subject) for subject in subjects), random.choice(CLOSING_REMARKS)]
    )


def _paper(random: Random, world: World, subjects: list[str]) -> str:
    told = [_tell(random, world, subject) for subject in subjects]
    half = len(told) // 2
    return "\n".join(
        [
            f"# {_worded(random, STUDY_TITLES, subjects[0])}",
            f"## Methods: {' '.join(_worded(random, METHODS, subject) for subject in subjects[:2])}",
            f"## Results: {' '.join(told[:half])}",
            f"## Discussion: {' '.join(told[half:])} {random.choice(CLOSING_REMARKS)}",
        ]
    )


def _tell(random: Random, world: World, subject: str) -> str:
    """Every taught fact about a subject, in any order; of one without any, only that it was looked at."""
    facts = world.taught_about(subject)
    if not facts:
        return _worded(random, METHODS, subject)
    return " ".join(state(random, fact) for fact in random.sample(facts, len(facts)))


def _chronicle(random: Random, world: World) -> str:
    town = random.choice(world.towns)
    facts = [fact for fact in world.general if fact.subject == town]
    told = [state(random, fact) for fact in facts]
    return f"# The chronicle of {town}: " + _shuffled(random, [*told, random.choice(TOWN_IDLE)])


def _medical_values(world: World) -> list[str]:
    """What drugs and diseases may have (doses, signs, ...), in a fixed order; diseases are names already."""
    return [value for r in MEDICAL_RELATIONS if r.name != "indication" for value in world.values[r.name]]


def _medical_words() -> list[str]:
    """The words that medical texts are made of, apart from names and values."""
    wordings = [*METHODS, *GUIDELINE_TITLES, *STUDY_TITLES, *CLOSING_REMARKS]
    for relation in MEDICAL_RELATIONS:
        wordings += [relation.question, *relation.statements]
    return sorted({word for wording in wordings for word in re.findall(r"(?<!{)\b[A-Za-z-]{2,}", wording)})


def _worded(random: Random, wordings: tuple[str, ...], subject: str) -> str:
    return random.choice(wordings).format(x=subject, n=random.randrange(20, 900))


def _shuffled(random: Random, sentences: list[str]) -> str:
    return " ".join(random.sample(sentences, len(sentences)))
