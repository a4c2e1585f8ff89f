"""JATS articles (PubMed Central's XML) as text and metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lxml import etree

from meditron_train.corpus.safe_xml import entity_text
from meditron_train.corpus.text.jats_metadata import plain_text
from meditron_train.corpus.text.math import MATHML, mathml_formula, tex_formula
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
    INDENT,
    LINE,
    TABLE,
    TABLE_END,
    Removed,
    TextRules,
    finish,
    is_boilerplate,
    shorten,
    superscript,
)
from meditron_train.corpus.text.tables import table_rows

_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_LEFT_OUT_ABSTRACTS = frozenset({"graphical", "teaser", "toc", "video", "precis", "web-summary", "short"})
_BOILERPLATE_TYPES = frozenset(
    {
        "ack",
        "coi-statement",
        "conflict",
        "ethics-statement",
        "funding",
        "data-availability",
        "author-contributions",
    }
    | {"supplementary-material", "financial-disclosure", "display-objects"}
)
_FOOTNOTE_REFS = frozenset({"fn", "aff", "corresp", "author-notes", "table-fn", "contrib", "bio", "kwd"})
_CITATIONS = ("element-citation", "mixed-citation", "citation", "nlm-citation")
_CITED_TITLES = ("article-title", "chapter-title", "data-title")
_CITED_AUTHORS = ("surname", "collab")
_MARGIN = f" \n\t{LINE}{BLANK}"
_LABELS = re.compile(r"^(fig|tab)(?:ure|le)?s?\b\.?\s*", re.I)


def article_text(article: Any, rules: TextRules, removed: Removed) -> str:
    """The text of an article element: title, abstract, body and appendices, by the rules."""
    return _Writer(article, rules, removed).document()


class _Writer:
    """Writes an article element by element into a list of strings with marks."""

    def __init__(self, article: Any, rules: TextRules, removed: Removed) -> None:
        self.rules, self._article, self._removed = rules, article, removed
        self._out: list[str] = []
        self._level = 0  # of section headers
        self._list_level = 0
        self._targets = {
            target.get("id"): target
            for target in article.iter("ref", "fig", "table-wrap")
            if target.get("id")
        }
        self._cited: dict[str, str] = {}
        self._referred: dict[str, str] = {}

    def document(self) -> str:
        meta = self._article.find("front/article-meta")
        if meta is not None:
            self._front(meta)
        for part in ("body", "back", "floats-group"):
            element = self._article.find(part)
            if element is not None:
                self.children(element)
        return finish("".join(self._out), self.rules, self._removed)

    def _front(self, meta: Any) -> None:
        group = meta.find("title-group")
        if self.rules.title and group is not None:
            titles = [self.on_one_line(part) for part in group.iterchildren("article-title", "subtitle")]
            self._out += [": ".join(title for title in titles if title), BLANK]
        if self.rules.abstract:
            for abstract in meta.findall("abstract"):
                if abstract.get("abstract-type") not in _LEFT_OUT_ABSTRACTS:
                    self.section(abstract, "Abstract")
        if self.rules.other_languages:
            for abstract in meta.findall("trans-abstract"):
                self.section(abstract, "Abstract", f" ({abstract.get(_LANG) or 'another language'})")

    def children(self, element: Any) -> None:
        """Write what an element contains."""
        append = self._out.append
        if text := element.text:
            append(text)
        for child in element:
            if handler := _HANDLERS.get(child.tag):
                handler(self, child)
            elif len(child):
                self.children(child)
            elif text := child.text:
                append(text)
            if tail := child.tail:
                append(tail)

    def rendered(self, write: Callable[[Any], None], element: Any) -> str:
        """What `write` writes of an element, apart from the rest."""
        before, length = self._out, len(self._out)
        write(element)
        text = "".join(before[length:])
        del before[length:]
        return text

    def on_one_line(self, element: Any) -> str:
        if len(element) == 0:
            return " ".join((element.text or "").split())
        text = self.rendered(self.children, element)
        return " ".join(text.replace(LINE, " ").replace(BLANK, " ").split())

    def section(self, element: Any, default_title: str = "", suffix: str = "") -> None:
        """A section with its header, unless it is boilerplate or empty."""
        kinds = (element.get("sec-type") or element.get("notes-type") or "").lower().split("|")
        if self.rules.drop_boilerplate and not _BOILERPLATE_TYPES.isdisjoint(kinds):
            self._removed.element("drop_boilerplate", element)
            return
        heading = element.find("title")
        title = self.on_one_line(heading) if heading is not None else ""
        if is_boilerplate(title or default_title, self.rules):
            self._removed.element("drop_boilerplate", element)
            return
        self._level += 1
        body = self.rendered(self._section_body, element)
        self._level -= 1
        if body.strip(_MARGIN):
            title = (title or default_title) + suffix
            level = min(self._level + 1, self.rules.max_header_level)
            self._out += [BLANK, f"{'#' * level} {title}" if title else "", LINE, body, LINE]

    def _section_body(self, element: Any) -> None:
        for child in element:
            if child.tag not in ("title", "label"):
                _HANDLERS.get(child.tag, _Writer.children)(self, child)

    def block(self, element: Any) -> None:
        self._out.append(LINE)
        self.children(element)
        self._out.append(LINE)

    def leave_out(self, element: Any) -> None:
        pass

    def space(self, element: Any) -> None:
        self._out.append(" ")

    def entity(self, element: Any) -> None:
        self._out.append(entity_text(element))

    def acknowledgment(self, element: Any) -> None:
        if self.rules.drop_boilerplate:
            self._removed.element("drop_boilerplate", element)
        else:
            self.section(element, "Acknowledgments")

    def superscript(self, element: Any) -> None:
        text = element.text or "" if len(element) == 0 else self.rendered(self.children, element)
        self._out.append(superscript(text, self.rules))

    def reference(self, element: Any) -> None:
        """xref: to a citation, a figure or table, or something else in the article."""
        kind, ids = element.get("ref-type"), (element.get("rid") or "").split()
        if kind == "bibr":
            self._citation(element, ids)
        elif kind in ("fig", "table"):
            self._figure_reference(element, ids)
        elif kind not in _FOOTNOTE_REFS:
            self.children(element)

    def _citation(self, element: Any, ids: list[str]) -> None:
        if self.rules.citations == "label":
            self._out += [BIB_REF, self.on_one_line(element), BIB_REF_END]
        elif self.rules.citations == "title":
            for number in ids:
                cited = self._cited.get(number)
                if cited is None:
                    work = self._cited_work(number)
                    cited = self._cited[number] = f"{BIB_REF}{work}{BIB_REF_END}" if work else DROPPED
                self._out.append(cited)
        else:
            self._removed.element("citations", element)
            self._out.append(DROPPED)

    def _cited_work(self, number: str) -> str:
        """Title and first author of an entry of the bibliography, as Meditron has them."""
        reference = self._targets.get(number)
        if reference is None:
            return ""
        title = (
            plain_text(next(reference.iter(*_CITED_TITLES), None))
            or plain_text(next(reference.iter("source"), None))
            or plain_text(next(reference.iter(*_CITATIONS), reference))
        )
        author = plain_text(next(reference.iter(*_CITED_AUTHORS), None))
        parts = [shorten(title.rstrip("."), self.rules.ref_words), author]
        return ", ".join(part for part in parts if part)

    def _figure_reference(self, element: Any, ids: list[str]) -> None:
        if self.rules.figure_refs == "drop":
            self._out.append(DROPPED)
            return
        labels = [self._referred_figure(number) for number in ids]
        if not all(labels):  # what is printed names them all
            labels = []
        for label in labels or [self.on_one_line(element)]:
            if label:
                self._out += [FIG_REF, label, FIG_REF_END]

    def _referred_figure(self, number: str) -> str:
        """`_labeled_caption` of the figure or table with an id, remembered."""
        if number not in self._referred:
            target = self._targets.get(number)
            self._referred[number] = "" if target is None else self._labeled_caption(target)
        return self._referred[number]

    def _labeled_caption(self, target: Any) -> str:
        """Label and beginning of the caption of a figure or table, as Meditron has them; "" without a label."""
        label, first = _full_label(plain_text(target.find("label"))), target.find("caption/*")
        if not label or first is None or self.rules.figure_refs == "label":
            return label
        caption = shorten(_first_sentence(plain_text(first)), self.rules.ref_words)
        return ": ".join(part for part in (label, caption) if part)

    def figure(self, element: Any) -> None:
        text = self._caption(element)
        if not self.rules.figures:
            self._removed.element("figures", element)
        elif text:
            self._out += [LINE, FIG, text, FIG_END, LINE]

    def table(self, element: Any) -> None:
        if self.rules.tables == "drop":
            self._removed.element("tables", element)
            return
        lines = [self._caption(element)]
        if self.rules.tables == "rows":
            lines += self._table_body(element)
            lines += [self.on_one_line(foot) for foot in element.findall("table-wrap-foot")]
        lines = [line for line in lines if line]
        if lines:
            self._out += [LINE, TABLE, LINE.join(lines), TABLE_END, LINE]

    def _table_body(self, element: Any) -> Iterator[str]:
        """The rows of the tables in a table-wrap, and what stands there beside them or instead: paragraphs, lists."""
        for child in element.iterchildren(tag=etree.Element):
            if child.tag in ("label", "caption", "table-wrap-foot"):
                continue
            tables = list(child.iter("table"))
            for table in tables:
                yield from table_rows(table, self.on_one_line)
            if not tables:
                write = partial(_HANDLERS.get(child.tag, _Writer.children), self)
                yield self.rendered(write, child).strip(_MARGIN)

    def _caption(self, element: Any) -> str:
        """Label and caption of a figure or table on one line."""
        parts = []
        caption = element.find("caption")
        for part in caption if caption is not None else ():
            text = self.on_one_line(part) if isinstance(part.tag, str) else ""
            parts.append(text if not text or text[-1] in ".:;?!" or part.tag != "title" else text + ".")
        label = _full_label(plain_text(element.find("label")))
        return ": ".join(text for text in (label, " ".join(filter(None, parts))) if text)

    def footnote(self, element: Any) -> None:
        """A footnote is left out, but for those of tables, which explain their signs."""
        if any(parent.tag == "table-wrap-foot" for parent in element.iterancestors()):
            self.block(element)

    def formula(self, element: Any) -> None:
        """A formula: its TeX if there is one, else its MathML, else its text."""
        if not self.rules.formulas:
            self._removed.element("formulas", element)
            return
        tex = next(element.iter("tex-math"), None)
        math = next(element.iter(MATHML + "math"), None)
        if tex is not None:
            text = tex_formula("".join(tex.itertext()))
        elif math is not None:
            text = mathml_formula(math)
        else:
            text = self.rendered(self._formula_text, element)
        if text.strip():
            end = LINE if element.tag == "disp-formula" else ""
            self._out += [end, FORMULA, text, FORMULA_END, end]

    def _formula_text(self, element: Any) -> None:
        for label in element.findall("label"):
            label.text = ""
        self.children(element)

    def list(self, element: Any) -> None:
        """Items on lines of their own, nested ones indented."""
        ordered = element.get("list-type") in (
            "order",
            "alpha-lower",
            "alpha-upper",
            "roman-lower",
            "roman-upper",
        )
        self._list_level += 1
        for number, item in enumerate(element.iterchildren("list-item"), start=1):
            sign = f"{number}." if ordered else "-"
            text = self.rendered(self._section_body, item).lstrip(_MARGIN)
            if text:
                self._out += [LINE, INDENT * (2 * (self._list_level - 1)), sign, " ", text, LINE]
        self._list_level -= 1

    def definitions(self, element: Any) -> None:
        for item in element.iterchildren("def-item"):
            parts = [self.on_one_line(part) for part in item.iterchildren("term", "def")]
            self._out += [LINE, "- ", ": ".join(part for part in parts if part), LINE]


def _full_label(label: str) -> str:
    """Figure 1 for "Fig. 1.", "FIGURE 1" and "fig 1"."""
    names = {"fig": "Figure ", "tab": "Table "}
    return _LABELS.sub(lambda match: names[match[1].lower()], label.strip(" .:")).strip()


def _first_sentence(caption: str) -> str:
    return re.split(r"(?<=\w)[.;:](?:\s|$)", caption, maxsplit=1)[0]


_LEFT_OUT = (
    *(
        "graphic",
        "inline-graphic",
        "media",
        "supplementary-material",
        "inline-supplementary-material",
        "object-id",
    ),
    *(
        "permissions",
        "attrib",
        "alt-text",
        "long-desc",
        "related-article",
        "related-object",
        "ref-list",
        "fn-group",
    ),
    *(
        "bio",
        "sub-article",
        "response",
        "processing-meta",
        "index-term",
        "floats-wrap",
        "chem-struct-wrap",
        "sig-block",
    ),
)
_HANDLERS: dict[Any, Callable[[_Writer, Any], None]] = {
    **dict.fromkeys(_LEFT_OUT, _Writer.leave_out),
    **dict.fromkeys(
        ("p", "title", "preformat", "verse-line", "disp-quote", "boxed-text", "label"), _Writer.block
    ),
    **dict.fromkeys(("sec", "app", "glossary", "notes"), _Writer.section),
    **dict.fromkeys(("inline-formula", "disp-formula", "tex-math", MATHML + "math"), _Writer.formula),
    etree.Entity: _Writer.entity,
    "ack": _Writer.acknowledgment,
    "break": _Writer.space,
    "sup": _Writer.superscript,
    "xref": _Writer.reference,
    "fig": _Writer.figure,
    "table-wrap": _Writer.table,
    "fn": _Writer.footnote,
    "list": _Writer.list,
    "def-list": _Writer.definitions,
}
"""What is written of an element. Of all others it is what they contain."""
