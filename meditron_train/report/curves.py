"""The columns of metrics.jsonl, and fewer points of them for a picture that hides nothing.

Thinning keeps the first and the last point and, of every stretch, the smallest and the largest value in their order: a
spike of a single step is still there among 100,000. A value that is not finite stays as a gap.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meditron_train.files import open_regular
from meditron_train.report.json_lines import decode_line

MAX_POINTS = 2000
_MAX_LINE_BYTES = 1 << 20
_MAX_KEYS = 512  # of a file that is not ours


@dataclass(frozen=True)
class Curve:
    """Values of one metric: steps int64 [n] ascending, values float64 [n], NaN and infinities included."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if len(self) else None

    @property
    def finite(self) -> Curve:
        """Without the values that are not finite."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])

    def scaled(self, factor: float) -> Curve:
        """In another unit; what leaves the range of a float64 is infinite."""
        with np.errstate(over="ignore"):
            return Curve(self.steps, self.values * factor)

    def thinned(self, max_points: int = MAX_POINTS) -> Curve:
        """At most about `max_points` of the points, minima and maxima among them (see above)."""
        if len(self) <= max_points:
            return self
        kept = [0, len(self) - 1]
        for first, end in _stretches(len(self), max(1, max_points // 2)):
            values = self.values[first:end]
            finite = np.flatnonzero(np.isfinite(values))
            if len(finite):
                kept += [
                    first + int(finite[np.argmin(values[finite])]),
                    first + int(finite[np.argmax(values[finite])]),
                ]
            if len(finite) < len(values):
                kept.append(first + int(np.flatnonzero(~np.isfinite(values))[0]))
        chosen = np.unique(np.array(kept))
        return Curve(self.steps[chosen], self.values[chosen])

    def means(self, num_stretches: int) -> Curve:
        """Mean of the finite values of each of `num_stretches` stretches of equal length, at its middle."""
        steps, values = [], []
        for first, end in _stretches(len(self), num_stretches):
            part = self.values[first:end]
            part = part[np.isfinite(part)]
            if len(part):
                steps.append(int(self.steps[(first + end - 1) // 2]))
                values.append(float(part.mean()))
        return Curve(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))


EMPTY = Curve(np.zeros(0, dtype=np.int64), np.zeros(0))


def _stretches(length: int, number: int) -> Iterator[tuple[int, int]]:
    """(first, end) of at most `number` parts of range(length), none of them empty."""
    edges = np.unique(np.linspace(0, length, min(number, length) + 1).astype(int)).tolist()
    yield from zip(edges, edges[1:], strict=False)


@dataclass
class Metrics:
    """All metrics of a run by key, and what was wrong with their file, a sentence each."""

    curves: dict[str, Curve]
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Curve:
        return self.curves.get(key, EMPTY)

    def with_prefix(self, prefix: str) -> dict[str, Curve]:
        """Name after the prefix -> curve."""
        return {
            key.removeprefix(prefix): curve for key, curve in self.curves.items() if key.startswith(prefix)
        }

    @property
    def last_step(self) -> int:
        """0 where there is none."""
        return max((int(curve.steps[-1]) for curve in self.curves.values() if len(curve)), default=0)


def read_metrics(path: Path) -> Metrics:
    """The columns of a metrics.jsonl; empty without the file. Lines that are torn, no JSON or out of order are left out
    and counted. Memory: 16 bytes a number."""
    columns: dict[str, tuple[array, array]] = {}
    problems: list[str] = []
    num_bad = num_behind = 0
    last_step = -1
    try:
        with open_regular(path) as file:
            while line := file.readline(_MAX_LINE_BYTES):
                if not line.endswith(b"\n"):
                    if len(line) == _MAX_LINE_BYTES:
                        num_bad += 1
                    else:
                        problems.append(f"The last line of {path.name} is torn and left out.")
                    continue
                try:
                    record = decode_line(line)
                    step = record["step"]
                    if type(step) is not int or not 0 <= step < 1 << 62:
                        raise ValueError
                except (ValueError, KeyError, RecursionError):
                    num_bad += 1
                    continue
                if step <= last_step:
                    num_behind += 1
                    continue
                last_step = step
                for key, value in record.items():
                    if type(value) in (int, float) and key != "step":
                        _append(columns, key, step, value)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    if num_bad:
        problems.append(f"{num_bad:,} lines of {path.name} are not records of a step and are left out.")
    if num_behind:
        problems.append(f"{num_behind:,} lines of {path.name} repeat earlier steps and are left out.")
    curves = {
        key: Curve(np.frombuffer(steps, dtype=np.int64), np.frombuffer(values, dtype=np.float64))
        for key, (steps, values) in columns.items()
    }
    return Metrics(curves, problems)


def _append(columns: dict[str, tuple[array, array]], key: str, step: int, value: float) -> None:
    if key not in columns:
        if len(columns) >= _MAX_KEYS:
            return
        columns[key] = (array("q"), array("d"))
    steps, values = columns[key]
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    steps.append(step)
    values.append(number)
