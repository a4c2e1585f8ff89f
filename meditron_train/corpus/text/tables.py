"""Tables of HTML's model (XHTML, JATS) as lines of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAX_SPAN = 100  # a larger one is a mistake


def table_rows(table: Any, text_of: Callable[[Any], str]) -> list[str]:
    """One line for each row, cells separated by " | ", each in its column.

    A cell that spans several columns or rows stands in the first; the others are empty. Rows without text are left out.
    """
    lines = []
    below: dict[int, int] = {}  # column -> rows that a cell above still covers
    for row in table.iter("tr"):
        cells: list[str] = []
        for cell in row.iterchildren("td", "th"):
            while below.get(len(cells), 0):
                below[len(cells)] -= 1
                cells.append("")
            columns, rows = (_span(cell, "colspan"), _span(cell, "rowspan")) if cell.attrib else (1, 1)
            if rows > 1:
                below.update(dict.fromkeys(range(len(cells), len(cells) + columns), rows - 1))
            cells.append(text_of(cell))
            cells += [""] * (columns - 1)
        if below:
            below.update(
                {column: rows - 1 for column, rows in below.items() if column >= len(cells) and rows}
            )
        if any(cells):
            lines.append(" | ".join(cells).rstrip(" |"))
    return lines


def _span(cell: Any, name: str) -> int:
    value = cell.get(name) or "1"
    return min(max(int(value), 1), _MAX_SPAN) if value.isdecimal() and len(value) < 10 else 1
