"""The text of a web page: trafilatura finds what is content, the rest is as for the other formats."""

from __future__ import annotations

import codecs
import re
from typing import Any

from meditron_train.corpus.text.rules import (
    BLANK,
    INDENT,
    LINE,
    TABLE,
    TABLE_END,
    Removed,
    TextRules,
    finish,
    is_boilerplate,
    superscript,
    with_marks,
    without_controls,
)
from meditron_train.errors import UserError

_ENCODING = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?([A-Za-z0-9_-]+)""", re.I)
_NOT_IN_WINDOWS_1252 = b"\x81\x8d\x8f\x90\x9d"  # which browsers show as nothing
_INLINE = frozenset({"hi", "del", "ref", "code"})


def page_text(data: bytes, url: str | None, rules: TextRules, removed: Removed) -> tuple[str, dict[str, Any]]:
    """Text and metadata (title, url, date, language) of an HTML page.

    Raises:
        UnicodeDecodeError: it is not in the encoding that it declares (UTF-8 where it declares none).
    """
    try:
        import trafilatura
    except ImportError as error:
        raise UserError("web pages need trafilatura: pip install 'meditron-train[corpus]'") from error
    # Its Markdown would escape characters of the text; the tree that it is made from is the page's own text.
    found = trafilatura.bare_extraction(
        _decoded(data),
        url=url,
        output_format="xml",
        with_metadata=True,
        include_formatting=True,
        include_links=False,
        include_images=False,
        include_comments=False,
        include_tables=rules.tables != "drop",
        date_extraction_params={"max_date": "2100-01-01", "original_date": True},
    )
    if found is None:
        return "", {}
    title = " ".join((found.title or "").split())
    text = finish(_Writer(title, rules, removed).document(found.body), rules, removed)
    metadata = {"title": title, "url": url or found.url, "date": found.date, "language": found.language}
    return text, {key: value for key, value in metadata.items() if value}


def _decoded(data: bytes) -> str:
    """The page by the encoding that it declares, as browsers read it: Latin-1 and ASCII mean Windows-1252."""
    declared = _ENCODING.search(data[:4096])
    try:
        name = codecs.lookup(declared[1].decode("ascii")).name if declared else "utf-8"
        if name in ("iso8859-1", "ascii", "cp1252"):
            return data.translate(None, _NOT_IN_WINDOWS_1252).decode("cp1252")
        return data.decode(name)
    except UnicodeDecodeError:
        raise
    except (LookupError, UnicodeError):  # there is no such encoding, or it is not one of pages
        return data.decode("utf-8")


class _Writer:
    """Writes trafilatura's tree element by element into a list of strings with marks."""

    def __init__(self, title: str, rules: TextRules, removed: Removed) -> None:
        self._title, self._rules, self._removed = title, rules, removed
        self._out: list[str] = [with_marks(title), BLANK] if rules.title and title else []
        self._left_out_level = 0  # of the boilerplate section that is being skipped
        self._list_level = 0

    def document(self, body: Any) -> str:
        for block in body:
            if block.tag == "head":
                self._header(block)
            elif self._left_out_level:
                self._removed.element("drop_boilerplate", block)
            else:
                self._element(block)
            if block.tail and not self._left_out_level:
                self._out.append(without_controls(block.tail))
        return "".join(self._out)

    def _header(self, element: Any) -> None:
        heading = self._on_one_line(element)
        rend = element.get("rend") or ""
        level = int(rend[1:]) if re.fullmatch("h[1-6]", rend) else 2
        if not self._left_out_level or level <= self._left_out_level:
            self._left_out_level = level if is_boilerplate(heading, self._rules) else 0
        if self._left_out_level:
            self._removed["drop_boilerplate"] += len(heading)
        elif heading and heading != self._title:
            self._out += [BLANK, "#" * min(level, self._rules.max_header_level), " ", heading, LINE]

    def _element(self, element: Any) -> None:
        if not isinstance(element.tag, str):
            return  # a comment
        if element.tag == "list":
            self._list(element)
        elif element.tag == "table":
            self._table(element)
        elif element.tag == "hi" and element.get("rend") == "#sup":
            self._out.append(superscript(self._rendered(element), self._rules))
        elif element.tag == "lb":
            self._out.append(LINE)
        elif element.tag in _INLINE:
            self._content(element)
        else:
            self._out.append(LINE)
            self._content(element)
            self._out.append(LINE)

    def _content(self, element: Any) -> None:
        # Line ends count in code and in quotations, which <pre> becomes.
        text_of = with_marks if element.tag in ("code", "quote") else without_controls
        if element.text:
            self._out.append(text_of(element.text))
        for child in element:
            self._element(child)
            if child.tail:
                self._out.append(text_of(child.tail))

    def _rendered(self, element: Any) -> str:
        """What is written of the content of an element, apart from the rest."""
        length = len(self._out)
        self._content(element)
        text = "".join(self._out[length:])
        del self._out[length:]
        return text

    def _on_one_line(self, element: Any) -> str:
        return " ".join(self._rendered(element).replace(LINE, " ").replace(BLANK, " ").split())

    def _list(self, element: Any) -> None:
        """Items on lines of their own, nested ones indented."""
        self._list_level += 1
        for number, item in enumerate(element.iterchildren("item"), start=1):
            sign = f"{number}." if element.get("rend") == "ol" else "-"
            text = self._rendered(item).lstrip(f" \n\t{LINE}{BLANK}")
            if text:
                self._out += [LINE, INDENT * (2 * (self._list_level - 1)), sign, " ", text, LINE]
        self._list_level -= 1

    def _table(self, element: Any) -> None:
        """One line for each row, cells separated by " | ", each in its column; trafilatura has filled the spans."""
        rows = [[self._on_one_line(cell) for cell in row.iterchildren("cell")] for row in element.iter("row")]
        lines = [" | ".join(cells).rstrip(" |") for cells in rows if any(cells)]
        if lines:
            self._out += [LINE, TABLE, LINE.join(lines), TABLE_END, LINE]
