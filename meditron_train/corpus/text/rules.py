"""The rules of the text, the special tokens, and the last steps that every text goes through.

Converters put marks into the text (control characters, which XML cannot contain and `with_marks` removes) for
special tokens and line ends. `finish` turns them into what they stand for after white space, URLs and literal
occurrences of the tokens have been dealt with (`without_tokens`, which the reader jsonl applies, too, unless its texts
are marked). So a source that contains the characters "[table]" cannot forge a token.
"""

from __future__ import annotations

import re
import unicodedata
from operator import itemgetter
from typing import Any, Literal

from meditron_train.config.section import Count, Section

SPECIAL_TOKENS = (
    *("[bib_ref]", "[/bib_ref]"),
    *("[fig_ref]", "[/fig_ref]"),
    *("[bib]", "[/bib]"),
    *("[fig]", "[/fig]"),
    *("[table]", "[/table]"),
    *("[formula]", "[/formula]"),
)
"""Meditron's, in its order: pairs around citations, references to figures and tables, bibliographies (which are left
out, so that no text has them), figures, tables, and formulas. What a corpus is tokenized with unless its declaration
says otherwise, and written into its data.yaml as data.special_tokens."""

LINE, BLANK, INDENT = "\x01", "\x02", "\x03"
"""Marks of a line end, of an empty line, and of a space that is kept at the beginning of a line."""
BIB_REF, BIB_REF_END, FIG_REF, FIG_REF_END, FORMULA, FORMULA_END, FIG, FIG_END, TABLE, TABLE_END = (
    "\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17"
)
"""Marks of the special tokens."""
DROPPED = "\x18"
"""Mark of something that was left out: what is around it is joined well."""
_TOKEN_OF = dict(
    zip(
        (BIB_REF, BIB_REF_END, FIG_REF, FIG_REF_END, FIG, FIG_END, TABLE, TABLE_END, FORMULA, FORMULA_END),
        (f" {token}" for token in SPECIAL_TOKENS if token not in ("[bib]", "[/bib]")),
        strict=True,
    )
) | {DROPPED: ""}
_MARK_OF_TOKEN = re.compile(f"([{''.join(_TOKEN_OF)}])")

BOILERPLATE_TITLES = (
    *("acknowledgement", "acknowledgements", "acknowledgment", "acknowledgments"),
    *(
        "author contributions",
        "authors contributions",
        "author contribution",
        "authors contribution",
        "contributors",
    ),
    *("author information", "authors information", "contributor information"),
    *(
        "availability of data and material",
        "availability of data and materials",
        "availability of supporting data",
    ),
    *("data availability", "data availability statement", "code availability", "data sharing statement"),
    *("competing interest", "competing interests", "conflict of interest", "conflict of interest statement"),
    *("conflicts of interest", "declaration of competing interest", "declaration of interest"),
    *("declaration of interests", "declaration of conflicting interests", "disclosure", "disclosures"),
    *(
        "consent for publication",
        "consent to participate",
        "ethical approval",
        "ethics approval",
        "ethics statement",
    ),
    *(
        "ethics approval and consent to participate",
        "informed consent",
        "institutional review board statement",
    ),
    *(
        "informed consent statement",
        "funding",
        "funding statement",
        "funding information",
        "financial support",
    ),
    *("grant support", "role of the funding source", "pre publication history", "provenance and peer review"),
    *(
        "publishers note",
        "disclaimer",
        "supplementary data",
        "supplementary information",
        "supplementary material",
    ),
    *("supplementary materials", "supporting information", "additional information", "additional files"),
    *(
        "electronic supplementary material",
        "references",
        "bibliography",
        "further reading",
        "trial registration number",
    ),
)
"""Titles of sections that say nothing medical: lower case, letters and spaces only."""


class TextRules(Section):
    """How documents are written down. The defaults give the text that Meditron was trained on, where that is known."""

    title: bool = True
    """The title stands first."""
    abstract: bool = True
    """The abstract of a full text is kept."""
    other_languages: bool = False
    """Abstracts in other languages than the article's are appended under headers that name the language."""
    max_header_level: Count = 3
    """Deeper sections get headers with as many #."""
    citations: Literal["title", "label", "drop"] = "title"
    """In-text citations. title: title and first author of the cited work; label: as printed ("12")."""
    figure_refs: Literal["caption", "label", "drop"] = "caption"
    """References to figures and tables. caption: with the beginning of the caption; label: "Figure 1"."""
    ref_words: Count = 12
    """Longer titles and captions in references are cut after as many words."""
    figures: bool = True
    """Labels and captions of figures are kept."""
    tables: Literal["rows", "caption", "drop"] = "rows"
    """rows: caption, one line for each row with " | " between cells, and the foot."""
    formulas: bool = True
    superscripts: Literal["caret", "plain"] = "caret"
    """caret: a superscript that contains a digit is written ^3, so that 10^3 does not become 103."""
    drop_boilerplate: bool = True
    """Acknowledgments, funding, conflicts of interest and other sections of `boilerplate_titles` are left out."""
    boilerplate_titles: tuple[str, ...] = BOILERPLATE_TITLES
    urls: bool = False
    """URLs are kept."""
    normalize: bool = True
    """Unicode normal form C, without control characters and invisible characters."""


class Removed(dict[str, int]):
    """Characters that rules took out of a text: urls, normalize, drop_boilerplate, and figures, tables, formulas and
    citations where these are left out. Bibliographies and graphics, which no rule can keep, are not counted."""

    def __missing__(self, rule: str) -> int:
        return 0

    def element(self, rule: str, element: Any) -> None:
        """Count the text of an XML element that is left out."""
        self[rule] += sum(map(len, element.itertext()))


def without_controls(text: str) -> str:
    """The text with a space for each control character but tab and line ends, so that it contains no marks."""
    return _CONTROL.sub(" ", text)


def without_tokens(text: str) -> str:
    """The text with "(table)" for "[table]", and so on, so that it contains no special tokens."""
    return _LITERAL_TOKEN.sub(r"(\1)", text)


def with_marks(text: str, *, indentation: bool = True) -> str:
    """Plain text with marks for its line ends and indentation, and spaces for its control characters.

    Args:
        text: the text.
        indentation: false for a part of a text, whose first spaces do not stand at the beginning of a line.
    """
    text = without_controls(text).replace("\r\n", "\n").replace("\r", "\n")
    if indentation:
        text = _INDENTATION.sub(lambda match: INDENT * len(match.group().expandtabs(4)), text)
    return _EMPTY_LINES.sub(BLANK, text).replace("\n", LINE)


def finish(text: str, rules: TextRules, removed: Removed) -> str:
    """The document of a text with marks: white space, URLs, tokens and line ends as they shall be.

    White space of the source counts as a space, whatever it is; line ends come from marks alone.
    """
    if rules.normalize and not text.isascii():
        composed = unicodedata.normalize("NFC", text)
        text = _INVISIBLE.sub("", composed)
        removed["normalize"] += len(composed) - len(text)
    source = text
    if not rules.urls and ("://" in text or "www." in text):
        length = len(text)
        for pattern in _URLS:
            text = pattern.sub("", text)
        removed["urls"] += length - len(text)
        text = text.replace("<>", "")
    if "[" in text or "(" in text:
        text = without_tokens(text)
        text = _without_brackets(text)
    if BIB_REF in text:
        text = _BETWEEN_CITATIONS.sub(f"{BIB_REF_END} {BIB_REF}", text)
    text = _with_tokens(text)
    if text == source:
        return _with_line_ends(text).lstrip(INDENT).replace(INDENT, " ")
    text = _with_line_ends(text)
    if "( [" in text:  # where something came or went
        text = text.replace("( [", "([")
    return _BEFORE_PUNCTUATION.sub(itemgetter(1), text).lstrip(INDENT).replace(INDENT, " ")


def superscript(text: str, rules: TextRules) -> str:
    """A superscript as it is written."""
    caret = rules.superscripts == "caret" and BIB_REF not in text and any(c.isdigit() for c in text)
    return f"^{text}" if caret else text


def _without_brackets(text: str) -> str:
    """No brackets around nothing but citations, or after a space around nothing; of nested ones the inner pair goes."""
    bare = _SQUARE_BRACKETS.sub(_within, text)
    bare = _ROUND_BRACKETS.sub(_within, bare)
    return bare if bare == text else bare.replace(_UNBRACKETED, "")


def _within(brackets: re.Match[str]) -> str:
    """What is left of brackets, between marks, so that no second pair around it goes."""
    return f"{_UNBRACKETED}{brackets[1] or ''}{_UNBRACKETED}"


def _with_tokens(text: str) -> str:
    """Special tokens for their marks, with one space on each side."""
    if not any(mark in text for mark in _TOKEN_OF):
        return text
    parts = _MARK_OF_TOKEN.split(text)
    parts[0] = parts[0].rstrip(" ")
    parts[2::2] = [f" {part}" if (part := between.strip(" ")) else "" for between in parts[2::2]]
    parts[1::2] = map(_TOKEN_OF.__getitem__, parts[1::2])
    return "".join(parts)


def _with_line_ends(text: str) -> str:
    """Line ends for marks, several of which count once; single spaces for white space, none around line ends."""
    for character in (
        _ASCII_SPACES if text.isascii() else _SPACES
    ):  # most texts have none, or one kind of them
        if character in text:
            text = text.replace(character, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    out: list[str] = []
    end = ""
    for part in text.replace(BLANK, LINE + BLANK + LINE).split(LINE):
        line = part.strip(" ")
        if line == BLANK:
            end = "\n\n"
        elif line:
            out += [end, line]
            end = "\n"
    return "".join(out[1:])


def is_boilerplate(title: str, rules: TextRules) -> bool:
    """Whether a section with this title is left out."""
    return rules.drop_boilerplate and plain_title(title) in rules.boilerplate_titles


def plain_title(title: str) -> str:
    """Lower case, letters and single spaces only; without a number in front and an apostrophe."""
    return " ".join(_NOT_LETTERS.sub(" ", title.lower().replace("'", "").replace("’", "")).split())


def shorten(text: str, num_words: int) -> str:
    """The first words, with "..." where some are missing."""
    words = text.split()
    return " ".join(words[:num_words]) + "..." if len(words) > num_words else " ".join(words)


_SPACES = "".join(filter(str.isspace, map(chr, range(1, 0x10000)))).replace(" ", "")
"""What str.split counts as white space, but the space."""
_ASCII_SPACES = "".join(filter(str.isascii, _SPACES))
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_INDENTATION = re.compile(r"^[ \t]+(?=\S)", re.M)
_EMPTY_LINES = re.compile(r"\n[ \t]*\n\s*")
_INVISIBLE = re.compile(
    "[\x7f-\x9f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffc-\uffff]"
)
_URL_REST = r"[^\s\x01-\x1f<>\"]*[^\s\x01-\x1f<>\".,;:)\]]"
_URLS = tuple(re.compile(start + _URL_REST) for start in (r"https?://", r"ftp://", r"www\."))
_LITERAL_TOKEN = re.compile(r"\[(/?(?:bib_ref|fig_ref|formula|bib|fig|table))\]")
_SEPARATOR = rf"[\s,;–—{DROPPED}-]*"
_BETWEEN_CITATIONS = re.compile(f"{BIB_REF_END}{_SEPARATOR}{BIB_REF}")
_IN_BRACKETS = rf"(?:\s*((?:{BIB_REF}[^{BIB_REF_END}]*{BIB_REF_END}{_SEPARATOR})+)|(?<=\s.){_SEPARATOR})[\])]"
_SQUARE_BRACKETS, _ROUND_BRACKETS = re.compile(r"\[" + _IN_BRACKETS), re.compile(r"\(" + _IN_BRACKETS)
_UNBRACKETED = "\x19"
_BEFORE_PUNCTUATION = re.compile(r" ([.,)\]])(?=\s|$)")
_NOT_LETTERS = re.compile(r"[^a-z]+")
