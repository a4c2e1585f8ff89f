"""The tables of a data card, as rows of text that Markdown and HTML share."""

from __future__ import annotations

from meditron_train.corpus.card.facts import (
    PAPER,
    PARTS,
    Counts,
    Facts,
    left_out,
    licenses,
    not_selected,
    sum_counts,
)
from meditron_train.corpus.card.settings import parameters, provenance
from meditron_train.corpus.card.table import Table, number


def tables(facts: Facts) -> list[Table]:
    """All tables of the card that have rows."""
    found = [
        _beside_the_paper(facts),
        _sources(facts),
        _licenses(facts),
        _funnel(facts),
        _left_out(facts),
        _rules(facts),
        _removed_text(facts),
        *parameters(facts.declared),
        _benchmarks(facts),
        _problems(facts),
        *provenance(facts),
    ]
    return [table for table in found if table.rows]


def _beside_the_paper(facts: Facts) -> Table:
    def row(name: str, ours: Counts, paper: tuple[int, int, int, int]) -> tuple[str, ...]:
        mine = (ours.train_documents, ours.validation_documents, ours.train_tokens, ours.validation_tokens)
        return (name, *(number(value) for pair in zip(mine, paper, strict=True) for value in pair))

    rows = [row(part, facts.counts(part), PAPER[part]) for part in PARTS]
    totals = tuple(sum(column) for column in zip(*PAPER.values(), strict=True))
    rows.append(row("total", facts.counts(), (totals[0], totals[1], totals[2], totals[3])))
    return Table(
        "Beside GAP-Replay",
        "Each number is followed by that of table 1 of the Meditron paper (arXiv 2311.16079).",
        (
            "part",
            *(
                f"{which}{what}>"
                for what in ("train documents", "validation documents", "train tokens", "validation tokens")
                for which in ("", "paper: ")
            ),
        ),
        rows,
    )


def _sources(facts: Facts) -> Table:
    rows = []
    for source in facts.sources:
        counts = sum_counts([source], facts.is_tokenized)
        status = {True: "released", False: "not released", None: ""}[source["released"]]
        rows.append(
            (
                source["name"],
                source["part"],
                ", ".join(licenses(source)) or source["license"],
                "yes" if source["redistribution"] else "no",
                status + ("" if source["is_given"] else (", " if status else "") + "not given here"),
                number(source["articles"]) if source["articles"] else "",
                number(counts.documents),
                number(counts.tokens),
            )
        )
    columns = (
        "source",
        "part",
        "license",
        "redistribution",
        "status",
        "paper: articles>",
        "documents>",
        "tokens>",
    )
    return Table("Sources", "In the order of their priority.", columns, rows)


def _licenses(facts: Facts) -> Table:
    rows = [
        (
            source["name"],
            license,
            number(counts["documents"]),
            number(counts["tokens"] if facts.is_tokenized else None),
        )
        for source in facts.sources
        for license, counts in licenses(source).items()
    ]
    note = "As each document states it; the declaration's, where it states none."
    return Table("Licenses", note, ("source", "license", "documents>", "tokens>"), rows)


def _funnel(facts: Facts) -> Table:
    rows = [
        (stage, number(dropped) if dropped else "", number(left)) for stage, dropped, left in facts.funnel()
    ]
    return Table("Funnel", "", ("stage", "dropped>", "left>"), rows)


def _left_out(facts: Facts) -> Table:
    rows = [
        (source["name"], reason, number(count))
        for source in facts.sources
        for reason, count in [*left_out(source).items(), *not_selected(source).items()]
    ]
    note = (
        "Records that became no document; of files that several sources share, at the first of these sources."
    )
    return Table("Left out by readers and of no source", note, ("source", "reason", "records>"), rows)


def _removed_text(facts: Facts) -> Table:
    rows = [
        (source["name"], rule, number(count))
        for source in facts.sources
        for rule, count in source.get("removed_chars", {}).items()
    ]
    note = "From the documents read, before the filters."
    return Table("Characters removed, by rule of the text", note, ("source", "rule", "characters>"), rows)


def _rules(facts: Facts) -> Table:
    rows = [
        (source["name"], rule, number(count))
        for source in facts.sources
        for rule, count in source["dropped"].items()
    ]
    note = "dropped.jsonl.zst names every dropped document, its rule, and the document that stands for it."
    return Table("Dropped, by rule", note, ("source", "rule", "documents>"), rows)


def _benchmarks(facts: Facts) -> Table:
    rows = [
        (
            benchmark["name"],
            number(benchmark["items"]),
            number(benchmark["too_short"]),
            number(benchmark["touched"]),
            f"{100 * benchmark['touched_share']:.2f} %",
            number(benchmark["touched_by_rule"]["ngram"]),
            number(benchmark["touched_by_rule"]["aligned"]),
            number(benchmark["documents"]),
            {"remove": "removed", "flag": "flagged"}[benchmark["action"]],
        )
        for benchmark in facts.benchmarks
    ]
    note = "contamination.jsonl has every hit with the words that are shared."
    columns = (
        *("benchmark", "items>", "too short to look for>", "touched>", "share>", "by ngram>", "by aligned>"),
        *("documents>", "which were"),
    )
    return Table("Benchmarks", note, columns, rows)


def _problems(facts: Facts) -> Table:
    rows = [(reason, number(count)) for reason, count in sorted(facts.problems.items())]
    note = "problems.jsonl has each with its file and position."
    return Table("Problems of the input", note, ("reason", "records>"), rows)
