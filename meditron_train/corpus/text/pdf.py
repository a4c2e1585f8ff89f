"""The text of PDF files, page by page: lines joined to paragraphs, running heads and page numbers left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from meditron_train.corpus.document import Reason
from meditron_train.corpus.text.rules import (
    BLANK,
    LINE,
    Removed,
    TextRules,
    finish,
    is_boilerplate,
    plain_title,
    with_marks,
)
from meditron_train.errors import UserError

_BULLET = re.compile(r"^\s*(?:[•●▪◦‣]|[–*o-](?=\s))\s*")
_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[a-z][.)])\s+\S")
_NUMBERS = re.compile(r"\d+")
_BIBLIOGRAPHY = frozenset({"references", "bibliography", "further reading"})
_EDGE_LINES = 2
"""Lines at the top and at the bottom of a page that may be running heads."""


class PdfError(Exception):
    """The file cannot be read as PDF, or has too much text."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def pdf_text(
    path: Path, max_chars: int, rules: TextRules, removed: Removed
) -> tuple[str, dict[str, Any], int]:
    """Text, metadata (title, num_pages) and the number of pages without text.

    Raises:
        PdfError: damaged, encrypted, or more than max_chars characters.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError("PDF files need pypdfium2: pip install 'meditron-train[corpus]'") from error
    pages: list[list[str]] = []
    num_chars = 0
    try:
        with pypdfium2.PdfDocument(path) as document:
            title = str(document.get_metadata_dict().get("Title") or "").strip()
            for number in range(len(document)):
                page = document[number]
                text = page.get_textpage().get_text_range()
                page.close()
                num_chars += len(text)
                if num_chars > max_chars:
                    raise PdfError(
                        Reason.TOO_LARGE, f"more than {max_chars} characters up to page {number + 1}"
                    )
                pages.append(
                    [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
                )
    except pypdfium2.PdfiumError as error:
        raise PdfError(Reason.BROKEN_FILE, str(error)) from None
    num_pages = len(pages)
    empty = sum(not any(line.strip() for line in page) for page in pages)
    lines = [line for page in _without_running_heads(pages) for line in page]
    text = finish(_written(title, lines, rules, removed), rules, removed)
    return (
        text,
        {key: value for key, value in {"title": title, "num_pages": num_pages}.items() if value},
        empty,
    )


def _without_running_heads(pages: list[list[str]]) -> list[list[str]]:
    """The pages without lines that, but for numbers, stand at the top or bottom of half of them."""
    edges: Counter[str] = Counter()
    for page in pages:
        texts = [line for line in page if line.strip()]
        edges.update({_same(line) for line in [*texts[:_EDGE_LINES], *texts[-_EDGE_LINES:]]})
    limit = max(2, len(pages) / 2)
    repeated = {line for line, count in edges.items() if count >= limit}
    kept = []
    for page in pages:
        filled = [number for number, line in enumerate(page) if line.strip()]
        at_edge = {*filled[:_EDGE_LINES], *filled[-_EDGE_LINES:]}
        kept.append(
            [
                line
                for number, line in enumerate(page)
                if number not in at_edge or not (_same(line) in repeated or line.strip().isdigit())
            ]
        )
    return kept


def _same(line: str) -> str:
    return _NUMBERS.sub("#", line.strip().lower())


def _written(title: str, lines: list[str], rules: TextRules, removed: Removed) -> str:
    lengths = sorted(len(line.strip()) for line in lines if line.strip())
    # Characters of a line that is not the last one.
    full = 0.8 * lengths[len(lengths) * 9 // 10] if lengths else 0.0
    paragraphs: list[str] = []
    ended = True
    for line in lines:
        text = line.strip()
        if not text:
            ended = True
            continue
        if ended or not paragraphs or _BULLET.match(text) or _NUMBERED.match(text):
            paragraphs.append(_BULLET.sub("- ", text))
            ended = len(text) < full  # a heading, or all that there is
        else:
            paragraphs[-1] += " " + text
            ended = len(text) < full and text[-1] in ".!?:"
    out = [with_marks(title), BLANK] if rules.title and title else []
    last = _bibliography_at_the_end(paragraphs, rules)
    skipping = False
    for number, paragraph in enumerate(paragraphs):
        if is_boilerplate(paragraph, rules):
            skipping = True
        elif skipping and number < last:
            skipping = not _is_heading(paragraph, full)
        if skipping:
            removed["drop_boilerplate"] += len(paragraph)
        elif paragraph != title:
            out += [with_marks(paragraph), LINE]
    return "".join(out)


def _bibliography_at_the_end(paragraphs: list[str], rules: TextRules) -> int:
    """Number of the header of the bibliography that ends the document, in the second half of the text; behind the last
    paragraph where there is none. Earlier ones are lines of a table of contents, or end a chapter."""
    length = num_chars = sum(map(len, paragraphs))
    for number in reversed(range(len(paragraphs))):
        length -= len(paragraphs[number])
        if length < num_chars / 2:
            break
        title = paragraphs[number]
        if is_boilerplate(title, rules) and plain_title(title) in _BIBLIOGRAPHY:
            return number
    return len(paragraphs)


def _is_heading(paragraph: str, full: float) -> bool:
    """Whether a paragraph looks like a header: nothing in a PDF says so."""
    text = paragraph.lstrip("0123456789. ")
    return len(paragraph) < full and text[:1].isupper() and text[-1] not in ".,;:!?"
