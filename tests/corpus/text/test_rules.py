"""The last steps of every text."""

from __future__ import annotations

import pytest

from meditron_train.corpus.text.rules import (
    BIB_REF,
    BIB_REF_END,
    BLANK,
    LINE,
    SPECIAL_TOKENS,
    TABLE,
    TABLE_END,
    Removed,
    TextRules,
    finish,
    is_boilerplate,
    shorten,
    with_marks,
)

CITED = f"{BIB_REF}A, B{BIB_REF_END}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("two  spaces,\na line\tand\u00a0more", "two spaces, a line and more"),
        (f"one{LINE} {LINE}two{BLANK}{LINE}three", "one\ntwo\n\nthree"),
        (f"shown [{CITED}, {CITED}].", "shown [bib_ref] A, B [/bib_ref] [bib_ref] A, B [/bib_ref]."),
        (f"shown ({CITED}), and", "shown [bib_ref] A, B [/bib_ref], and"),
        (f"shown (see {CITED}) and", "shown (see [bib_ref] A, B [/bib_ref]) and"),
        ("shown [, ] and ( ) f()", "shown and f()"),
        ("p < .05 , and", "p < .05 , and"),
        ("p < .05 (), and [] .", "p < .05, and."),
        ("at https://example.org/a_(b)?c=d#e. Then", "at. Then"),
        ("see (www.example.org) or", "see or"),
        ("see ftp://x.org/y, <https://z.org>", "see,"),
        ("soft\u00adhyphen zero\u200bwidth \ufeffe\u0301", "softhyphen zerowidth é"),
        ("a [table] b [/bib_ref] [fig 1] [tables]", "a (table) b (/bib_ref) [fig 1] [tables]"),
        (f"x{LINE}{TABLE}a | b{LINE}c{TABLE_END}{LINE}y", "x\n[table] a | b\nc [/table]\ny"),
    ],
)
def test_finish(source, text):
    assert finish(source, TextRules(), Removed()) == text


def test_rules_can_be_switched_off():
    text = "see https://example.org/a e\u0301\u200b"
    assert finish(text, TextRules(urls=True, normalize=False), Removed()) == text


def test_plain_text_cannot_forge_marks():
    source = "a \x0e b\x01c\x15\r\n  d\r\n \r\n\r\ne\rf"
    assert finish(with_marks(source), TextRules(), Removed()) == "a b c\n  d\n\ne\nf"


def test_tokens_come_in_pairs_and_are_unique():
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS) == 12
    assert [token.replace("[", "[/") for token in SPECIAL_TOKENS[::2]] == list(SPECIAL_TOKENS[1::2])


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Authors' contributions", True),
        ("Authors’ Contributions:", True),
        ("6. Conflict of Interest", True),
        ("Funding", True),
        ("Funding of hospitals", False),
        ("Methods", False),
        ("", False),
    ],
)
def test_boilerplate(title, expected):
    assert is_boilerplate(title, TextRules()) is expected
    assert not is_boilerplate(title, TextRules(drop_boilerplate=False))


def test_shorten():
    assert shorten(" a  b c ", 3) == "a b c"
    assert shorten("a b c d", 3) == "a b c..."
