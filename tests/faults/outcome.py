"""What a fault did to a run, as the campaign records it; docs/explanation/reliability.md shows it as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """One injected fault.

    Attributes:
        fault: its name; one row of the table for all with the same name.
        where: "Slurm" (sbatch launch/train.sbatch on a cluster of one host) or "ranks" (processes, started again by a
            supervisor as torchrun and the batch script would).
        promise: what should happen.
        recovery_s: from the fault until the run had caught up with the step it was hit at.
        steps_lost: steps that had to be taken again, beyond those of a checkpoint.
        most_lost: the most steps that the promise allows to be lost: those since the last checkpoint.
        last_step, planned_step: where the run ended, and where it should.
        identical: every loss is bit-identical to that of the undisturbed run (on another number of ranks: within 1e-5).
        starts: times the run was started.
        problem: what broke the promise; "" when nothing did.
    """

    fault: str
    where: str
    promise: str
    recovery_s: float
    steps_lost: int
    most_lost: int
    last_step: int
    planned_step: int
    identical: bool
    starts: int
    problem: str = ""
    detail: str = ""

    @property
    def kept(self) -> bool:
        """The promise was kept: the planned end, the same losses, and no more lost than it allows."""
        return (
            not self.problem
            and self.identical
            and self.last_step == self.planned_step
            and self.steps_lost <= self.most_lost
        )

    def append_to(self, path: Path) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read_outcomes(path: Path) -> list[Outcome]:
    """All records of a campaign, also of one that was interrupted."""
    outcomes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # a torn last line
    return outcomes


def compare(
    steps: list[int],
    losses: list[float],
    undisturbed: list[float],
    tolerance: float = 0.0,
    *,
    gaps: bool = False,
) -> tuple[int, bool, str]:
    """(last step, losses identical within `tolerance` x their size, what is wrong with them).

    `gaps`: lines may be missing, as where the disk was full; none may be there twice.
    """
    planned = len(undisturbed)
    last = steps[-1] if steps else 0
    in_order = sorted(set(steps)) == steps if gaps else steps == list(range(1, last + 1))
    if not in_order:
        return last, False, "the metrics do not have each step once"
    for step, ours in zip(steps, losses, strict=True):
        theirs = undisturbed[step - 1]
        if not abs(ours - theirs) <= tolerance * theirs:
            return last, False, f"the loss of step {step} differs from the undisturbed run's"
    return last, True, "" if last == planned else f"the run ended at step {last} of {planned}"
