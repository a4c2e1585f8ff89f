"""The table of docs/explanation/reliability.md from the results of a campaign.

python -m tests.faults.table RESULTS.jsonl            print it
python -m tests.faults.table RESULTS.jsonl --write    put it between the marks in docs/explanation/reliability.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from tests.faults.outcome import Outcome, read_outcomes

DOCUMENT = Path(__file__).parents[2] / "docs" / "explanation" / "reliability.md"
BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per fault, in the order of the campaign; numbers are median and largest."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.where, outcome.fault), []).append(outcome)
    lines = [
        "| fault | on | promised | kept | recovery (s), median / most | steps taken again, median / most |",
        "|---|---|---|---|---|---|",
    ]
    for (where, fault), found in rows.items():
        kept = sum(outcome.kept for outcome in found)
        recovery = [outcome.recovery_s for outcome in found]
        lost = [outcome.steps_lost for outcome in found]
        lines.append(
            f"| {fault} | {where} | {found[0].promise} | {kept} of {len(found)} | "
            f"{statistics.median(recovery):.0f} / {max(recovery):.0f} | {statistics.median(lost):.0f} / {max(lost)} |"
        )
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One sentence on all of it, and one on each promise that was broken."""
    broken = [outcome for outcome in outcomes if not outcome.kept]
    identical = sum(outcome.identical and outcome.last_step == outcome.planned_step for outcome in outcomes)
    lines = [
        f"{len(outcomes)} faults: {len(outcomes) - len(broken)} promises kept, {len(broken)} broken; "
        f"{identical} runs ended at the planned step with the losses of the undisturbed run."
    ]
    for outcome in broken:
        what = (
            outcome.problem
            or f"{outcome.steps_lost} steps were taken again, {outcome.most_lost} were promised"
        )
        lines.append(f"- Broken: {outcome.fault} ({outcome.where}): {' '.join(what.split())}")
    return "\n".join(lines)


def replace_between_marks(text: str, content: str) -> str:
    """`text` with what stands between the marks replaced. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    outcomes = read_outcomes(options.results)
    content = f"{summary(outcomes)}\n\n{table(outcomes)}"
    if options.write:
        DOCUMENT.write_text(replace_between_marks(DOCUMENT.read_text(), content))
    else:
        print(content)


if __name__ == "__main__":
    main()
