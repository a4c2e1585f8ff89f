"""A table of the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A heading, column names (right-aligned where they end in >), rows."""

    heading: str
    note: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
