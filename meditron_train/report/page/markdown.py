"""A page as Markdown for a repository: tables, and for each chart its numbers and a line of blocks."""

from __future__ import annotations

import math
import re
from typing import Any

from meditron_train.report.page.blocks import (
    Block,
    Chart,
    Facts,
    LayoutDrawing,
    Page,
    Preformatted,
    Table,
    Text,
)
from meditron_train.report.page.words import number

_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 40


def render_markdown(page: Page) -> str:
    """GitHub-flavored Markdown. No text of the run can become markup."""
    lines = [f"# {_escaped(page.title)}: {_escaped(page.state.text)}", "", _escaped(page.lead), ""]
    lines += _block(page.tiles) if page.tiles.rows else []
    for section in page.sections:
        lines += [f"## {_escaped(section.title)}", ""]
        charts = [block for block in section.blocks if isinstance(block, Chart)]
        lines += _charts(charts) if charts else []
        for block in section.blocks:
            lines += _block(block)
    return "\n".join([*lines, _escaped(page.footer), ""])


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"**{_escaped(block.text)}**" if block.tone else _escaped(block.text), ""]
    if isinstance(block, Facts):
        return _table(("", "", ""), [(label, value.text, note) for label, value, note in block.rows])
    if isinstance(block, Table):
        heading = [f"{_escaped(block.caption)}:", ""] if block.caption else []
        return heading + _table(block.columns, [[cell.text for cell in row] for row in block.rows])
    if isinstance(block, Preformatted):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return [f"{_escaped(block.title)}:", "", fence + "text", block.text.rstrip("\n"), fence, ""]
    if isinstance(block, LayoutDrawing):
        rows = [
            (host, f"{box.rank}", f"{box.stage}", "; ".join(box.lines))
            for host, boxes in block.nodes
            for box in boxes
        ]
        return _table(("node", "rank", "stage", "holds"), rows)
    return []  # charts stand together


def _charts(charts: list[Chart]) -> list[str]:
    rows = []
    for chart in charts:
        for trace in chart.traces:
            values = [value for value in trace["y"] if value is not None]
            if not values or trace.get("showlegend") is False or "hovertext" in trace:
                continue
            numbers = [number(value) for value in (values[0], values[-1], min(values), max(values))]
            rows.append((chart.title, str(trace["name"]), *numbers, _bars(values)))
    return _table(("chart", "curve", "first", "last", "least", "most", "over the run"), rows)


def _bars(values: list[float]) -> str:
    """Means of stretches as blocks, from the least to the most of them."""
    size = math.ceil(len(values) / _NUM_BARS)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    least, spread = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - least) / spread * 7) if spread else 0] for mean in means)


def _table(columns: Any, rows: Any) -> list[str]:
    head = "| " + " | ".join(_escaped(column) for column in columns) + " |"
    rule = "|" + "---|" * len(columns)
    return [head, rule, *("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows), ""]


def _escaped(text: str) -> str:
    """On one line, with nothing in it that Markdown or HTML would take for markup."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
