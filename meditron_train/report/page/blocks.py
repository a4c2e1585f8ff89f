"""What a report is made of: sections of facts, tables, charts and a drawing of the layout. All text is plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Tone = Literal["", "good", "warn", "bad"]


@dataclass(frozen=True)
class Cell:
    """Text with a tone, in a table or beside a fact."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; with a tone it stands out."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Facts:
    """Label, value and an explanation, "" where none is needed."""

    rows: tuple[tuple[str, Cell, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        numeric: columns that are right-aligned.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Preformatted:
    """A file or a traceback, folded away under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        traces: plotly's, without colors; `meta` has the number of the color and whether it is faint.
        layout: plotly's, without colors and sizes.
        note: what is to be known to read it.
    """

    name: str
    title: str
    traces: tuple[dict[str, Any], ...]
    layout: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class RankBox:
    """One rank in the drawing of a layout."""

    rank: int
    stage: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class LayoutDrawing:
    """Nodes with the ranks on them."""

    nodes: tuple[tuple[str, tuple[RankBox, ...]], ...]


Block = Text | Facts | Table | Preformatted | Chart | LayoutDrawing


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        state: of the run, in a word.
        lead: one or two sentences on it.
        tiles: the key numbers.
        refresh_s: how often the page loads itself again where it is served; None: never.
    """

    title: str
    state: Cell
    lead: str
    tiles: Facts
    sections: tuple[Section, ...]
    footer: str = ""
    refresh_s: int | None = None

    @property
    def charts(self) -> list[Chart]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    *,
    caption: str = "",
    numeric: Sequence[int] = (),
) -> Table:
    """A `Table` of plain strings and cells."""
    return Table(
        tuple(columns),
        tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows),
        caption,
        frozenset(numeric),
    )


def facts(rows: Sequence[tuple[str, str | Cell, str]]) -> Facts:
    """`Facts` of plain strings and cells."""
    return Facts(
        tuple((label, value if isinstance(value, Cell) else Cell(value), note) for label, value, note in rows)
    )
