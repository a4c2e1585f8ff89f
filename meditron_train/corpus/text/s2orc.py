"""The text of S2ORC v1 papers: annotations, which are JSON in strings, say what lies where in the text.

Offsets count characters (code points), end exclusive. Figures and tables are annotations of the kind `figure`, ids of
tables begin with "tab". Header of the page, authors and bibliography are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from meditron_train.corpus.text.rules import (
    BIB_REF,
    BIB_REF_END,
    BLANK,
    DROPPED,
    FIG,
    FIG_END,
    FIG_REF,
    FIG_REF_END,
    FORMULA,
    FORMULA_END,
    LINE,
    TABLE,
    TABLE_END,
    Removed,
    TextRules,
    finish,
    is_boilerplate,
    shorten,
    with_marks,
    without_controls,
)

_LEFT_OUT = ("title", "author", "authoraffiliation", "venue", "publisher", "bibentry")
_WRITTEN = ("sectionheader", "formula", "bibref", "figureref", "tableref", "figure", "table")
_LABEL = re.compile(r"\s*(?P<kind>fig|tab)[a-z]*\.?\s*(?P<number>S?\d+[A-Za-z]?|[IVX]+\b)[\s.:|-]*", re.I)


class AnnotationError(ValueError):
    """The annotations are not what the format demands."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    kind: str
    attributes: Mapping[str, Any]


def paper_title(content: Mapping[str, Any]) -> str:
    """The title that is annotated; "" without one."""
    title = next(_spans(content, "title"), None)
    return " ".join(content["text"][title.start : title.end].split()) if title else ""


def paper_text(content: Mapping[str, Any], title: str, rules: TextRules, removed: Removed) -> str:
    """The text of a paper, by the rules.

    Args:
        content: the record's `content`, with `text` and `annotations`.

    Raises:
        AnnotationError: annotations are not JSON, or point outside the text.
    """
    return _Paper(content, rules, removed).document(title)


def _spans(content: Mapping[str, Any], kind: str) -> Iterator[_Span]:
    annotations = content.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise AnnotationError(f"annotations are {type(annotations).__name__}; an object is needed")
    stored = annotations.get(kind)
    if not stored:
        return
    num_chars = len(content["text"])
    try:
        for annotation in orjson.loads(stored) if isinstance(stored, str) else stored:
            attributes = dict(annotation.get("attributes") or {})
            span = _Span(int(annotation["start"]), int(annotation["end"]), kind, attributes)
            if not 0 <= span.start <= span.end <= num_chars:
                raise AnnotationError(
                    f"annotation {kind} is at {span.start}..{span.end} of a text of {num_chars} characters"
                )
            yield span
    except AnnotationError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AnnotationError(f"annotation {kind} cannot be read: {error!r}") from None


class _Paper:
    def __init__(self, content: Mapping[str, Any], rules: TextRules, removed: Removed) -> None:
        self._content, self._rules, self._removed = content, rules, removed
        self._text = without_controls(content["text"])
        self._titles = list(_spans(content, "bibtitle"))
        self._authors = list(_spans(content, "bibauthorlastname"))
        self._captions = list(_spans(content, "figurecaption"))
        self._targets = {
            str(span.attributes["id"]): span
            for kind in ("bibentry", "figure", "table")
            for span in _spans(content, kind)
            if span.attributes.get("id") is not None
        }

    def document(self, title: str) -> str:
        spans = [span for kind in (*_LEFT_OUT, *_WRITTEN) for span in _spans(self._content, kind)]
        spans.sort(key=lambda span: (span.start, -span.end))
        headers = [span.start for span in spans if span.kind == "sectionheader"]
        abstract = next(_spans(self._content, "abstract"), None)
        starts = headers + ([abstract.start] if abstract else [])
        position = min(starts, default=0)  # before it are journal, authors and addresses
        out = [with_marks(title), BLANK] if self._rules.title and title else []
        if abstract and self._rules.abstract and not any(start <= abstract.start for start in headers):
            out += ["# Abstract", LINE]
        skipping = False
        for span in spans:
            if span.start < position:
                continue  # inside another one, or before the paper begins
            if skipping:
                self._removed["drop_boilerplate"] += span.start - position
            else:
                out.append(with_marks(self._text[position : span.start], indentation=False))
            if span.kind == "sectionheader":
                skipping = is_boilerplate(self._text[span.start : span.end], self._rules)
            # Figures stand behind all sections, and belong to none.
            if skipping and span.kind not in ("figure", "table"):
                self._removed["drop_boilerplate"] += span.end - span.start
            else:
                out += self._written(span)
            position = span.end
        if skipping:
            self._removed["drop_boilerplate"] += len(self._text) - position
        else:
            out.append(with_marks(self._text[position:], indentation=False))
        return finish("".join(out), self._rules, self._removed)

    def _written(self, span: _Span) -> list[str]:
        text = " ".join(self._text[span.start : span.end].split())
        if span.kind == "sectionheader":
            depth = str(span.attributes.get("n") or "").strip(".").count(".") + 1
            return [BLANK, "#" * min(depth, self._rules.max_header_level), " ", text, LINE] if text else []
        if span.kind == "formula":
            return [LINE, FORMULA, text, FORMULA_END, LINE] if self._rules.formulas and text else []
        if span.kind == "bibref":
            return self._citation(span, text)
        if span.kind in ("figureref", "tableref"):
            return self._reference(span, text)
        return self._figure(span) if span.kind in ("figure", "table") else []

    def _citation(self, span: _Span, text: str) -> list[str]:
        if self._rules.citations == "label":
            return [BIB_REF, text, BIB_REF_END]
        entry = self._targets.get(str(span.attributes.get("ref_id")))
        if self._rules.citations == "drop" or entry is None:
            return [DROPPED]
        parts = [
            shorten(self._inside(entry, self._titles), self._rules.ref_words),
            self._inside(entry, self._authors),
        ]
        cited = ", ".join(part for part in parts if part)
        return [BIB_REF, cited, BIB_REF_END] if cited else [DROPPED]

    def _inside(self, outer: _Span, spans: list[_Span]) -> str:
        """The text of the first of the spans that lies in another one."""
        for span in spans:
            if outer.start <= span.start and span.end <= outer.end:
                return " ".join(self._text[span.start : span.end].split())
        return ""

    def _reference(self, span: _Span, text: str) -> list[str]:
        if self._rules.figure_refs == "drop":
            return [DROPPED]
        target = self._targets.get(str(span.attributes.get("ref_id")))
        label, caption = self._label_and_caption(target) if target else ("", "")
        label = label or text
        if self._rules.figure_refs == "caption" and caption:
            sentence = re.split(r"(?<=\w)[.;:](?:\s|$)", caption, maxsplit=1)[0]
            label = f"{label}: {shorten(sentence, self._rules.ref_words)}"
        return [FIG_REF, label, FIG_REF_END] if label else []

    def _figure(self, span: _Span) -> list[str]:
        is_table = span.kind == "table" or str(span.attributes.get("id") or "").lower().startswith("tab")
        label, caption = self._label_and_caption(span)
        text = ": ".join(part for part in (label, caption) if part)
        if not text or (self._rules.tables == "drop" if is_table else not self._rules.figures):
            return []
        begin, end = (TABLE, TABLE_END) if is_table else (FIG, FIG_END)
        return [LINE, begin, text, end, LINE]

    def _label_and_caption(self, span: _Span) -> tuple[str, str]:
        """Figure 1, and the caption without it."""
        text = " ".join(self._text[span.start : span.end].split())
        caption = self._inside(span, self._captions) or text
        for place in (caption, text):
            if match := _LABEL.match(place):
                name = "Figure" if match["kind"].lower() == "fig" else "Table"
                rest = place[match.end() :] if place is caption else caption
                return f"{name} {match['number']}", rest
        return "", caption
