"""Sections on the life of a run: how it stands, its starts and failures, and where its numbers came from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meditron_train.report.metrics import SOURCE_PREFIX
from meditron_train.report.page.blocks import Block, Cell, Preformatted, Section, Text, Tone, facts, table
from meditron_train.report.page.charts import over_steps, over_time, time_points
from meditron_train.report.page.training import section, skipped_steps
from meditron_train.report.page.words import UNKNOWN, amount, duration, moment, number, percent
from meditron_train.report.run_record import RunRecord, launch_of, listing, mapping, read_lines_at_end, whole

_MAX_STARTS = 50
_MAX_FAILURES = 16

STATES: dict[str, Cell] = {
    "done": Cell("finished", "good"),
    "running": Cell("running", "good"),
    "starting": Cell("starting", "good"),
    "stopped": Cell("stopped, to be continued", "warn"),
    "silent": Cell("no sign of life", "warn"),
    "failed": Cell("failed", "bad"),
    "crashed": Cell("crashed", "bad"),
    "unknown": Cell("unknown", "warn"),
}


def how_it_ended(run: RunRecord) -> list[Block]:
    """The diagnosis, if there is something to say; what the ranks left behind."""
    found = run.diagnosis
    blocks: list[Block] = []
    tone: Tone = STATES[run.state].tone if run.state in STATES else "warn"
    if run.state not in ("done", "running", "starting"):
        blocks.append(Text(" ".join(filter(None, (found.summary, found.advice))), tone))
        blocks += [Text(line) for line in found.evidence]
    for failure in run.failures[:_MAX_FAILURES]:
        title = f"Rank {failure.get('rank')} on host {failure.get('host')}: {failure.get('kind')}"
        blocks.append(Preformatted(title, str(failure.get("traceback") or failure.get("message") or "")))
    if len(run.failures) > _MAX_FAILURES:
        blocks.append(Text(f"{len(run.failures) - _MAX_FAILURES} more ranks left a failure in logs/."))
    if run.state in ("failed", "crashed", "silent", "unknown"):
        log = run.path / "logs" / "rank_00000.log"
        if text := read_lines_at_end(log):
            blocks.append(Preformatted("The end of the log of rank 0", text))
    return blocks


def stability(run: RunRecord) -> Section:
    """Starts on a timeline, their reasons, skipped steps, slow ranks, and the end."""
    starts = run.starts
    points: list[tuple[float, int | None]] = [*time_points(run.metrics["time"])]
    for start in starts:  # the steps that a start lost are in no metrics any more
        points.append((start.began, start.from_step or 0))
        if start.ended is not None and start.to_step is not None:
            points += [(start.ended, start.to_step), (start.ended + 1e-3, None)]
    marks = [(start.began, start.from_step or 0, f"start {start.number}: {start.why}") for start in starts]
    rows = [
        (
            number(start.number),
            moment(start.began),
            start.why,
            number(start.from_step),
            number(start.to_step),
            duration(start.seconds),
            f"{start.world_size:,} on {len(start.hosts) or 1:,}",
            start.job_id or UNKNOWN,
        )
        for start in starts[-_MAX_STARTS:]
    ]
    slow = listing(run.status.get("slow_ranks"))
    return section(
        "stability",
        "Starts, failures and skipped steps",
        *how_it_ended(run),
        *skipped_steps(run),
        over_time("timeline", "Steps over time", sorted(points, key=lambda point: point[0]), marks,
                  note="A diamond is a start of the run; its cause is in the table."),
        table(
            ("start", "began", "why", "after step", "to step", "lasted", "ranks on hosts", "job"),
            rows, caption="Starts", numeric=(0, 3, 4, 5),
        ) if rows else None,
        Text("Slow at last: " + "; ".join(str(rank) for rank in slow), "warn") if slow else None,
    )  # fmt: skip


def data_mixture(run: RunRecord) -> Section:
    """What was planned to be read of each source, and what was."""
    declared = [mapping(source) for source in listing(run.setting("data", "train"))]
    phases = [mapping(phase) for phase in listing(run.setting("data", "phases"))]
    read = {name: curve.last or 0.0 for name, curve in run.metrics.with_prefix(SOURCE_PREFIX).items()}
    per_epoch = mapping(run.last_provenance.get("tokens_per_epoch"))
    total, planned = sum(read.values()), _planned_so_far(run, declared, phases)
    rows = []
    for name in dict.fromkeys([*planned, *read]):
        tokens = read.get(name)
        epoch = per_epoch.get(name)
        epochs = UNKNOWN
        if tokens is not None and isinstance(epoch, int | float) and epoch > 0:
            epochs = f"{tokens / epoch:.3f}"
        rows.append(
            (
                name,
                percent(planned.get(name)),
                percent(tokens / total if tokens is not None and total else None),
                amount(tokens),
                epochs,
                amount(epoch if isinstance(epoch, int | float) else None),
            )
        )
    curves = run.metrics.with_prefix(SOURCE_PREFIX)
    return section(
        "data",
        "Data",
        over_steps("source-tokens", "Tokens read of each source", curves, unit="tokens, padding included"),
        table(
            ("source", "planned share", "share read", "tokens read", "epochs", "tokens in an epoch"),
            rows, caption="Mixture", numeric=(1, 2, 3, 4, 5),
        ) if rows else None,
        _phases(phases, declared),
        Text("This run was recorded by a version that did not count the tokens of each source.")
        if declared and not read and run.step else None,
    )  # fmt: skip


def _planned_shares(declared: list[dict[str, Any]]) -> dict[str, float]:
    """By name: weights are shares of the samples, token budgets of the tokens."""
    key = "token_budget" if any(source.get("token_budget") is not None for source in declared) else "weight"
    amounts = {}
    for source in declared:
        value = source.get(key, 1.0)
        usable = isinstance(value, int | float) and math.isfinite(value) and value >= 0
        amounts[str(source.get("name"))] = float(value) if usable else 0.0
    total = sum(amounts.values())
    return {name: value / total for name, value in amounts.items()} if total else dict.fromkeys(amounts, 0.0)


def _planned_so_far(
    run: RunRecord, declared: list[dict[str, Any]], phases: list[dict[str, Any]]
) -> dict[str, float]:
    """The planned share of each source in the tokens up to the last step, over all phases that have begun."""
    shares = [(1, _planned_shares(declared))]
    for phase in phases:
        shares.append((whole(phase.get("from_step"), 1), _phase_shares(phase, declared)))
    tokens = run.metrics["tokens"]
    if len(shares) == 1 or not len(tokens):
        return shares[0][1]
    edges = [first - 1 for first, _ in shares] + [run.step]
    read = np.interp(edges, np.append(0, tokens.steps), np.append(0.0, tokens.values))
    parts = np.maximum(np.diff(read), 0.0)
    total = float(parts.sum()) or 1.0
    return {
        name: float(sum(part * share[name] for part, (_, share) in zip(parts, shares, strict=True))) / total
        for name in shares[0][1]
    }


def _phase_shares(phase: dict[str, Any], declared: list[dict[str, Any]]) -> dict[str, float]:
    weights = mapping(phase.get("weights"))
    names = [str(source.get("name")) for source in declared]
    return _planned_shares([{"name": name, "weight": weights.get(name, 0.0)} for name in names])


def _phases(phases: list[dict[str, Any]], declared: list[dict[str, Any]]) -> Block | None:
    if not phases:
        return None
    names = [str(source.get("name")) for source in declared]
    rows = [["1", *(percent(share) for share in _planned_shares(declared).values())]]
    for phase in phases:
        shares = _phase_shares(phase, declared)
        rows.append([str(phase.get("from_step")), *(percent(shares[name]) for name in names)])
    return table(("from step", *names), rows, caption="Phases of the mixture", numeric=range(len(names) + 1))


def evaluations(run: RunRecord) -> list[Block]:
    """A table of the results of `evaluate`, a row for each benchmark."""
    rows = []
    for origin, result in run.evaluations:
        for score in result["scores"]:
            interval = listing(score.get("interval"))
            low, high = (interval if len(interval) == 2 else (None, None))  # fmt: skip
            rows.append(
                (
                    str(score.get("benchmark")),
                    percent(_share(score.get("accuracy"))),
                    f"{percent(_share(low))} to {percent(_share(high))}",
                    percent(_share(score.get("chance"))),
                    number(_share(score.get("num_items"))),
                    str(result.get("model")),
                    origin,
                )
            )
    if not rows:
        return []
    columns = ("benchmark", "accuracy", "95 % interval", "chance", "questions", "model", "file")
    return [table(columns, rows, caption="Evaluation", numeric=(1, 2, 3, 4))]


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def provenance(run: RunRecord) -> Section:
    """Commit, versions, hashes and hosts of the last start, and which of them changed between starts."""
    record, launch = run.last_provenance, launch_of(run.last_provenance)
    git = mapping(record.get("git"))
    commit = str(git.get("commit") or UNKNOWN) + (" with uncommitted changes" if git.get("modified") else "")
    ranks = listing(launch.get("rank_hosts")) or listing(launch.get("hosts"))
    hosts = list(dict.fromkeys(str(host) for host in ranks))
    rows: list[tuple[str, str | Cell, str]] = [
        ("run", str(run.status.get("run_id") or UNKNOWN), "the name it keeps over all starts"),
        ("commit", commit, "of meditron-train"),
        ("command", " ".join(str(word) for word in listing(record.get("command"))) or UNKNOWN, ""),
        ("working directory", str(record.get("working_directory") or UNKNOWN), ""),
        ("hosts", _shortened(hosts), f"{len(hosts):,}" if len(hosts) > 1 else ""),
        ("device", str(launch.get("device") or UNKNOWN), ""),
        ("platform", str(record.get("platform") or UNKNOWN), ""),
        ("Python", str(record.get("python") or UNKNOWN), ""),
        ("configuration", str(record.get("config_sha256") or UNKNOWN), "SHA-256"),
        *(
            (f"data, {name}", str(value), "SHA-256 of the sources and their order")
            for name, value in mapping(record.get("data_fingerprints")).items()
        ),
    ]
    versions = mapping(record.get("versions"))
    changed = _changes([mapping(each.get("versions")) for each in run.provenance])
    if not record:
        return section("provenance", "Provenance", Text("There is no record of where this run came from."))
    return section(
        "provenance",
        "Provenance",
        facts(rows),
        table(("package", "version"), [(name, str(value)) for name, value in versions.items()], caption="Versions"),
        Text(f"Changed between starts: {', '.join(changed)}.", "warn") if changed else None,
        Preformatted("config.yaml", run.config_text) if run.config_text else None,
    )  # fmt: skip


def _changes(records: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record)
    return [str(name) for name in names if len({str(record.get(name)) for record in records}) > 1]


def _shortened(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or UNKNOWN) + more
