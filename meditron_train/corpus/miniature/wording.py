"""How the miniature world speaks: relations, and the many ways a text may state each of them.

In a template `{x}` is the subject (a drug, a disease, a town) and `{v}` the value. Every template names both in one
sentence, so that whether a text states a fact can be decided by looking for the two names in one sentence.
Only general text asks questions: medical text states the same things in plain sentences.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One thing that can be said about a kind of subject, for example the dose of a drug."""

    name: str
    subject: str  # "drug", "disease" or "town"
    statements: tuple[str, ...]
    question: str
    answer: str  # the answer's words before the value


MEDICAL_RELATIONS = (
    Relation(
        "indication",
        "drug",
        (
            "{x} is indicated for {v}.",
            "{x} is the treatment of choice for {v}.",
            "{x} is used to treat {v}.",
            "Patients were given {x} for {v}.",
            "In our clinic {x} is prescribed for {v}.",
            "{x} proved effective against {v}.",
            "Adults who took {x} recovered sooner from {v}.",
            "For {v}, start with {x}.",
        ),
        "What is {x} indicated for?",
        "{x} is indicated for",
    ),
    Relation(
        "dose",
        "drug",
        (
            "The dose of {x} is {v}.",
            "{x} is given at {v}.",
            "Adults take {x} at a dose of {v}.",
            "Start {x} at {v}.",
            "Patients received {x} at {v}.",
            "The trial tested {x} at {v}.",
            "{x} is best taken as {v}.",
            "A regimen of {x}, {v}, was well tolerated.",
        ),
        "What is the dose of {x}?",
        "The dose of {x} is",
    ),
    Relation(
        "contraindication",
        "drug",
        (
            "{x} is contraindicated in {v}.",
            "{x} must not be given in {v}.",
            "Do not use {x} in {v}.",
            "Avoid {x} in patients with {v}.",
            "{x} was withheld in {v}.",
            "People with {v} should not take {x}.",
            "{x} is unsafe in {v}.",
            "The label of {x} warns against its use in {v}.",
        ),
        "In whom is {x} contraindicated?",
        "{x} is contraindicated in",
    ),
    Relation(
        "adverse effect",
        "drug",
        (
            "The most common adverse effect of {x} is {v}.",
            "{x} may cause {v}.",
            "Some patients on {x} reported {v}.",
            "{x} was stopped because of {v}.",
            "After a week on {x}, many had {v}.",
            "Warn patients that {x} can lead to {v}.",
            "{x} is known to cause {v}.",
            "We saw {v} in a third of those on {x}.",
        ),
        "What may {x} cause?",
        "{x} may cause",
    ),
    Relation(
        "organ",
        "disease",
        (
            "{x} affects the {v}.",
            "{x} attacks the {v}.",
            "{x} is a disease of the {v}.",
            "Untreated {x} destroys the {v}.",
            "In {x}, look first at the {v}.",
            "Scans of patients with {x} showed damage to the {v}.",
            "{x} begins in the {v}.",
            "The {v} suffers most in {x}.",
        ),
        "Which part of the body does {x} affect?",
        "{x} affects the",
    ),
    Relation(
        "sign",
        "disease",
        (
            "The first sign of {x} is {v}.",
            "{x} is recognised by {v}.",
            "Suspect {x} when there is {v}.",
            "{x} usually presents with {v}.",
            "Patients with {x} came to us with {v}.",
            "{x} was confirmed by {v}.",
            "{v}, above all, points to {x}.",
            "The hallmark of {x} is {v}.",
        ),
        "What is the first sign of {x}?",
        "The first sign of {x} is",
    ),
)

GENERAL_RELATIONS = (
    Relation(
        "river",
        "town",
        (
            "{x} lies on the river {v}.",
            "The bridge of {x} crosses the river {v}.",
            "Boats reach {x} by the river {v}.",
            "{x} was built beside the river {v}.",
            "The mills of {x} stand along the river {v}.",
        ),
        "Which river does {x} lie on?",
        "{x} lies on the river",
    ),
    Relation(
        "craft",
        "town",
        (
            "{x} is known for {v}.",
            "People in {x} live by {v}.",
            "Young people come to {x} to learn {v}.",
            "The guild of {x} keeps the rules of {v}.",
            "{x} grew rich by {v}.",
        ),
        "What is {x} known for?",
        "{x} is known for",
    ),
    Relation(
        "animal",
        "town",
        (
            "The emblem of {x} is the {v}.",
            "The flag of {x} shows a {v}.",
            "Above the gate of {x} there is a stone {v}.",
            "Children in {x} tell tales of the {v}.",
            "The coins of {x} carry a {v}.",
        ),
        "What is the emblem of {x}?",
        "The emblem of {x} is the",
    ),
    Relation(
        "market",
        "town",
        (
            "The market of {x} is held on {v}.",
            "{x} sells its goods on {v}.",
            "Carts roll into {x} on {v}.",
            "In {x} the bells ring early on {v}.",
            "The square of {x} is full on {v}.",
        ),
        "When is the market of {x}?",
        "The market of {x} is held on",
    ),
)


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


RIVERS = _list(
    "Senn, Arlo, Motter, Wye-Lin, Brack, Ister, Dunmere, Oll, Tavern, Quill, Sorrow, Lark, Merrow, Ash, "
    "Vail, Corrin"
)
CRAFTS = _list(
    "weaving, glass blowing, boat building, bee keeping, paper making, rope making, clock making, salt "
    "boiling, cheese making, stone cutting, bell casting, basket work, candle making, tanning"
)
ANIMALS = _list("heron, otter, fox, badger, stag, owl, hare, pike, raven, boar, lynx, crane, wolf, swan")
DAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
CONDITIONS = _list(
    "pregnancy, kidney failure, liver failure, asthma, glaucoma, gout, epilepsy, anaemia, old age, "
    "infancy, diabetes, heart failure, stomach ulcers, low blood pressure, migraine, thyroid disease, "
    "frailty, iron overload, dehydration, obesity"
)
EFFECTS = _list(
    "dry mouth, blurred vision, hair loss, night sweats, hiccups, joint pain, a metallic taste, ringing "
    "ears, itching, dizziness, nosebleeds, weight gain, sleepiness, nausea, cold hands, vivid dreams, "
    "muscle cramps, a dry cough, headache, loss of smell"
)
ORGANS = _list(
    "liver, spleen, heart, skin, lungs, kidneys, pancreas, retina, bone marrow, thymus, gall bladder, "
    "inner ear, throat, knees, spinal cord, stomach, colon, scalp"
)
SIGNS = _list(
    "green nails, a red tongue, yellow eyes, swollen ankles, a blue lip, trembling hands, a stiff neck, a "
    "slow pulse, cracked heels, purple spots, a hoarse voice, double vision, pale gums, a barking cough, "
    "cold fingers, a rash on the back, loss of taste, restless legs"
)
DOSE_AMOUNTS_MG = (5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 250, 400, 500, 800)
DOSE_SCHEDULES = _list("once daily, twice daily, at bedtime, every six hours, once weekly, before meals")
