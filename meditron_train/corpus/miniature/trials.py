"""Invented trials of the miniature world's drugs, and whether each helped: as rows of PubMedQA.

No text of the world tells of these trials, and drug and disease are drawn at random: the abstract alone says whether
the answer is yes, no or maybe. Who has not learned to answer so can do no better than guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from meditron_train.corpus.miniature.texts import CLOSING_REMARKS
from meditron_train.corpus.miniature.world import World

FINDINGS = {
    "yes": (
        "Those on {x} recovered sooner.",
        "{x} proved effective in most of them.",
        "After a month on {x}, the signs were gone.",
    ),
    "no": (
        "{x} did not help at all.",
        "Those without {x} recovered as soon.",
        "After a month on {x}, nothing had changed.",
    ),
    "maybe": (
        "{x} was effective in some, and in others not.",
        "Half of them recovered sooner, half did not.",
        "The record of {x} was not clear.",
    ),
}
REASONS = {"yes": "{x} was effective.", "no": "{x} was not effective.", "maybe": "The record was not clear."}


def trial_questions(world: World, number: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of PubMedQA, as the Hub has them; yes, no and maybe equally often (within one)."""
    random = Random(f"trials {world.seed} {seed}")
    for index in range(number):
        decision = list(FINDINGS)[index % len(FINDINGS)]
        drug, disease = random.choice(world.drugs), random.choice(world.diseases)
        methods = f"{random.randrange(20, 900)} people with {disease} were given {drug}."
        finding = random.choice(FINDINGS[decision]).format(x=drug)
        yield {
            "pubid": seed * 1_000_000 + index,
            "question": f"Does {drug} help against {disease}?",
            "context": {"contexts": [f"{methods} {finding}", random.choice(CLOSING_REMARKS)]},
            "long_answer": REASONS[decision].format(x=drug),
            "final_decision": decision,
        }
