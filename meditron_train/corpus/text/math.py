"""Formulas on one line: TeX without its wrapping, presentation MathML in TeX's notation for scripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MATHML = "{http://www.w3.org/1998/Math/MathML}"
_DOCUMENT = re.compile(r"\\begin\{document\}(.*?)\\end\{document\}", re.S)
_WRAPPING = re.compile(r"^\s*(?:\$\$?|\\\[|\\\()|(?:\$\$?|\\\]|\\\))\s*$")
_MAX_DEPTH = 64  # deeper ones are typesetting gone wrong; their texts are joined


def tex_formula(source: str) -> str:
    """The formula in the text of a tex-math element: without preamble and dollar signs."""
    match = _DOCUMENT.search(source)
    return " ".join(_WRAPPING.sub("", (match[1] if match else source).strip()).split())


def mathml_formula(element: Any) -> str:
    """A math element on one line: x^2, (a+b)/(c), sqrt(x), a_i^2, rows of a matrix separated by ;"""
    return " ".join(_row(element, 0).split())


def _row(element: Any, depth: int) -> str:
    return "".join(_formula(child, depth + 1) for child in element)


def _formula(element: Any, depth: int) -> str:
    tag = element.tag if isinstance(element.tag, str) else ""
    name = tag.removeprefix(MATHML)
    if depth > _MAX_DEPTH:
        return "".join(element.itertext())
    if name in ("mi", "mn", "mtext", "ms"):
        return " ".join("".join(element.itertext()).split())
    if name == "mo":
        return "".join(element.itertext()).strip().translate(_INVISIBLE_OPERATORS)
    if name in ("mspace", "annotation", "annotation-xml", "maction"):
        return " " if name == "mspace" else ""
    if name == "semantics":
        return _formula(element[0], depth + 1) if len(element) else ""
    parts = [_formula(child, depth + 1) for child in element]
    build = _LAYOUTS.get(name)
    if build is None or len(parts) < build[0]:
        return "".join(parts)
    return build[1](parts)


def _group(text: str) -> str:
    return text if len(text) == 1 or text.isalnum() else f"({text})"


def _script(text: str) -> str:
    return text if text.isalnum() else f"({text})"


_INVISIBLE_OPERATORS = {0x2061: None, 0x2062: None, 0x2063: None, 0x2064: None}
_LAYOUTS: dict[str, tuple[int, Callable[[list[str]], str]]] = {
    "mfrac": (2, lambda p: f"{_group(p[0])}/{_group(p[1])}"),
    "msup": (2, lambda p: f"{_group(p[0])}^{_script(p[1])}"),
    "mover": (2, lambda p: f"{_group(p[0])}^{_script(p[1])}"),
    "msub": (2, lambda p: f"{_group(p[0])}_{_script(p[1])}"),
    "munder": (2, lambda p: f"{_group(p[0])}_{_script(p[1])}"),
    "msubsup": (3, lambda p: f"{_group(p[0])}_{_script(p[1])}^{_script(p[2])}"),
    "munderover": (3, lambda p: f"{_group(p[0])}_{_script(p[1])}^{_script(p[2])}"),
    "msqrt": (1, lambda p: f"sqrt({''.join(p)})"),
    "mroot": (2, lambda p: f"root({p[0]}, {p[1]})"),
    "mfenced": (0, lambda p: f"({', '.join(p)})"),
    "mtr": (0, lambda p: ", ".join(p)),
    "mtable": (0, lambda p: f"[{'; '.join(p)}]"),
}
"""Element: the number of parts it needs, and how they are written."""
