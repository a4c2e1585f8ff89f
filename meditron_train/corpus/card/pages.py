"""The card as Markdown, as a Hugging Face dataset card, and as one HTML page with a picture of the funnel."""

from __future__ import annotations

from html import escape
from typing import Any

import yaml

from meditron_train.corpus.card.facts import Facts
from meditron_train.corpus.card.table import Table, number
from meditron_train.corpus.card.tables import tables

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))


def markdown(facts: Facts) -> str:
    """For people and repositories."""
    lines = [f"# {facts.title}", ""]
    lines += [facts.description, ""] if facts.description else []
    lines += [_summary(facts), ""]
    for table in tables(facts):
        lines += [
            f"## {table.heading}",
            "",
            *([table.note, ""] if table.note else []),
            *_markdown_table(table),
            "",
        ]
    lines += ["## Citations", ""]
    lines += [
        f"- {source['name']}: {_one_line(source['citation'])}" + _link(source["url"])
        for source in facts.sources
    ]
    return "\n".join(lines) + "\n"


def dataset_card(facts: Facts) -> str:
    """README.md of a dataset on the Hugging Face Hub: the same below a header that the Hub reads."""
    documents = facts.counts().documents
    size = next((name for limit, name in _SIZES + _LARGER if documents < limit), "100M<n<1B")
    configs = []
    for source in facts.sources:
        files = [
            {"split": split, "path": f"documents/{source['name']}.{split}.jsonl.zst"}
            for split, counts in source["splits"].items()
            if counts["documents"]
        ]
        if files:
            configs.append({"config_name": source["name"], "data_files": files})
    header: dict[str, Any] = {
        "pretty_name": facts.title,
        "license": "other",
        "license_name": "mixed",
        "license_link": "#sources",
        "language": list(facts.languages),
        "task_categories": ["text-generation"],
        "tags": ["medical"],
        "size_categories": [size],
        "configs": configs,
    }
    closed = [
        source["name"] for source in facts.sources if source["is_given"] and not source["redistribution"]
    ]
    warning = (
        f"**Not to be redistributed:** {', '.join(closed)}. Remove these files before you publish.\n\n"
        if closed
        else ""
    )
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{warning}{markdown(facts)}"
    )


def html(facts: Facts) -> str:
    """One page that needs nothing else."""
    parts = [f"<h1>{escape(facts.title)}</h1>"]
    parts += [f"<p>{escape(facts.description)}</p>"] if facts.description else []
    parts += [f"<p>{escape(_summary(facts))}</p>", _funnel_picture(facts)]
    for table in tables(facts):
        parts.append(f"<h2>{escape(table.heading)}</h2>")
        parts += [f"<p>{escape(table.note)}</p>"] if table.note else []
        parts.append(_html_table(table))
    parts.append("<h2>Citations</h2><ul>")
    for source in facts.sources:
        url = source["url"]
        link = (
            f' <a href="{escape(url)}">{escape(url)}</a>'
            if url and url.startswith(("http://", "https://"))
            else ""
        )
        parts.append(f"<li>{escape(source['name'])}: {escape(_one_line(source['citation']))}{link}</li>")
    parts.append("</ul>")
    return _PAGE.format(title=escape(facts.title), style=_STYLE, body="\n".join(parts))


def _summary(facts: Facts) -> str:
    counts = facts.counts()
    tokens = f" and {number(counts.tokens)} tokens" if counts.tokens is not None else ""
    given = sum(source["is_given"] for source in facts.sources)
    kept = f"{number(counts.documents)} documents{tokens}"
    return f"Version {facts.declared.version}: {kept} from {given} sources, built by meditron-train {facts.built_with}."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _link(url: str | None) -> str:
    return f" <{url}>" if url else ""


def _markdown_table(table: Table) -> list[str]:
    names = [column.rstrip(">") for column in table.columns]
    lines = ["---:" if column.endswith(">") else "---" for column in table.columns]
    rows = [names, lines, *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _html_table(table: Table) -> str:
    kinds = [' class="n"' if column.endswith(">") else "" for column in table.columns]

    def row(cells: Any, tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{kind}>{escape(cell.rstrip('>') if tag == 'th' else cell)}</{tag}>"
                for cell, kind in zip(cells, kinds, strict=True)
            )
            + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table><thead>{row(table.columns, "th")}</thead><tbody>{body}</tbody></table></div>'


def _funnel_picture(facts: Facts) -> str:
    """Bars of the documents left after each stage; the pale end of a bar was dropped there."""
    rows = facts.funnel()
    largest = max(rows[0][2], 1)
    height, width, left = 26, 460, 210
    parts = []
    for place, (stage, dropped, rest) in enumerate(rows):
        y = place * height
        kept_width, dropped_width = width * rest / largest, width * dropped / largest
        text = number(rest) + (f" (−{number(dropped)})" if dropped else "")
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(stage)}</text>'
            f'<rect class="kept" x="{left}" y="{y + 4}" width="{kept_width:.1f}" height="18"/>'
            f'<rect class="dropped" x="{left + kept_width:.1f}" y="{y + 4}" width="{dropped_width:.1f}" height="18"/>'
            f'<text x="{left + kept_width + dropped_width + 8:.1f}" y="{y + 17}">{escape(text)}</text>'
        )
    total_width, total_height = left + width + 190, len(rows) * height + 6
    return (
        f'<svg role="img" aria-label="Documents left after each stage" viewBox="0 0 {total_width} {total_height}">'
        f"{''.join(parts)}</svg>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #fff; --line: #d5dce3; --kept: #1f77a4; --dropped: #f0b27a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe6ec; --paper: #14191f; --line: #33404d; --kept: #4aa3d0; --dropped: #8a5a2b; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; }
svg { width: 100%; max-width: 54rem; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: var(--ink); }
.kept { fill: var(--kept); }
.dropped { fill: var(--dropped); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
