"""The facts of the miniature world: which drug treats what, at which dose, never in whom; a few are held out.

Everything follows from the seed. A value is drawn uniformly and independently for each fact, so that a reader who
has not read a fact can do no better than chance among values of the same relation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from meditron_train.corpus.miniature import wording
from meditron_train.corpus.miniature.wording import GENERAL_RELATIONS, MEDICAL_RELATIONS, Relation

DRUG_STEMS = "zel vor tam bri que lax nor dex fil gan mor pra ruv sol tev xan".split()
DRUG_MIDDLES = "a i o e u".split()
DRUG_ENDINGS = "pril mab statin zole nib vir dine mycin pam lol".split()
EPONYMS_FRONT = "Bor Har Quis Tarn Mel Dag Vos Pel Lund Gris Orm Strand".split()
EPONYMS_BACK = "land low by sen ter wick mann holt".split()
AILMENTS = ("fever", "syndrome", "palsy", "rot", "cough", "ague")
TOWNS_FRONT = "Oak Wind Stone Mill Fern Salt Hollow Bright Crow Thorn Amber Elder".split()
TOWNS_BACK = "ford bridge dale haven mouth gate stead well field moor".split()


@dataclass(frozen=True)
class Fact:
    """`value` is what `relation` says about `subject`."""

    relation: Relation
    subject: str
    value: str


@dataclass(frozen=True)
class World:
    """All facts; `taught` may be stated by texts, `held_out` never are, `general` are about towns."""

    seed: int
    drugs: tuple[str, ...]
    diseases: tuple[str, ...]
    towns: tuple[str, ...]
    taught: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    general: tuple[Fact, ...]
    values: dict[str, tuple[str, ...]]  # relation name -> every value that the relation can take

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everything that medical texts are about."""
        return self.drugs + self.diseases

    def taught_about(self, subject: str) -> list[Fact]:
        """The facts about a subject that a text may state."""
        return [fact for fact in self.taught if fact.subject == subject]


def build_world(
    seed: int = 0,
    *,
    num_drugs: int = 76,
    num_diseases: int = 48,
    num_towns: int = 60,
    held_out_share: float = 0.5,
) -> World:
    """Invent a world; equal arguments give an equal world on every machine."""
    random = Random(seed)
    drugs = _invent(
        random, num_drugs, lambda a, b, c: (a + b + c).capitalize(), DRUG_STEMS, DRUG_MIDDLES, DRUG_ENDINGS
    )
    diseases = _invent(
        random, num_diseases, lambda a, b, c: f"{a}{b} {c}", EPONYMS_FRONT, EPONYMS_BACK, AILMENTS
    )
    towns = _invent(random, num_towns, lambda a, b: a + b, TOWNS_FRONT, TOWNS_BACK)
    subjects = {"drug": drugs, "disease": diseases, "town": towns}
    doses = [
        f"{mg} mg {schedule}" for mg, schedule in product(wording.DOSE_AMOUNTS_MG, wording.DOSE_SCHEDULES)
    ]
    values = {
        "indication": diseases,
        "dose": tuple(random.sample(doses, 24)),
        "contraindication": wording.CONDITIONS,
        "adverse effect": wording.EFFECTS,
        "organ": wording.ORGANS,
        "sign": wording.SIGNS,
        "river": wording.RIVERS,
        "craft": wording.CRAFTS,
        "animal": wording.ANIMALS,
        "market": wording.DAYS,
    }

    def draw(relation: Relation) -> list[Fact]:
        return [
            Fact(relation, subject, random.choice(values[relation.name]))
            for subject in subjects[relation.subject]
        ]

    taught: list[Fact] = []
    held_out: list[Fact] = []
    for relation in MEDICAL_RELATIONS:
        facts = draw(relation)
        random.shuffle(facts)
        num_held_out = round(held_out_share * len(facts))
        held_out += facts[:num_held_out]
        taught += facts[num_held_out:]
    general = [fact for relation in GENERAL_RELATIONS for fact in draw(relation)]
    return World(seed, drugs, diseases, towns, tuple(taught), tuple(held_out), tuple(general), values)


def _invent(random: Random, number: int, join: Callable[..., str], *parts: Sequence[str]) -> tuple[str, ...]:
    """`number` distinct names out of all combinations of the parts."""
    return tuple(join(*pieces) for pieces in random.sample(list(product(*parts)), number))
