"""Charts of curves: over the steps, stacked, and over the time of day. Plotly's words, no colors (the page has those).

Nothing here imports plotly: a chart is the JSON that plotly.js reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from meditron_train.report.curves import MAX_POINTS, Curve
from meditron_train.report.page.blocks import Chart

_NUM_MEANS = 200
_MANY_POINTS = 300  # from here on a line is noise, and its mean is drawn over it
_NUM_STACKED = 300
_LAST_MOMENT = 32_503_680_000  # the year 3000: what lies beyond is no time


def over_steps(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    *,
    unit: str = "",
    logarithmic: bool = False,
    smooth: bool = False,
    staircase: bool = False,
    exponents: str = "B",
    note: str = "",
) -> Chart | None:
    """A line for each curve over the steps; None where no curve has a finite value.

    A curve without one takes its color all the same, so that a run has one color in every chart.

    Args:
        smooth: of a long curve also the mean, over a faint line of all its minima and maxima.
        staircase: a value holds until the next one.
        exponents: of the axis, as plotly calls them: "B" for k, M, B, T.
    """
    traces: list[dict[str, Any]] = []
    notes = [note] if note else []
    num_shown = sum(len(curve.finite) > 0 for curve in curves.values())
    for color, (label, curve) in enumerate(curves.items()):
        if not len(curve.finite):
            continue
        whose = f"{label}: " if len(curves) > 1 else ""
        if num_lost := len(curve) - len(curve.finite):
            words = "value is not finite (a gap)" if num_lost == 1 else "values are not finite (gaps)"
            notes.append(f"{whose}{num_lost:,} {words}.")
        thin = curve.thinned(max(200, MAX_POINTS // max(1, num_shown // 2)))
        trace = _line(thin, label, color, mode="lines+markers" if len(curve) <= 40 else "lines")
        if staircase:
            trace["line"]["shape"] = "hv"
        if len(thin) < len(curve):
            notes.append(f"{whose}{len(curve):,} points, drawn by the least and the most of every stretch.")
        if smooth and len(curve) > _MANY_POINTS:
            faint = {"meta": {"color": color, "faint": True}, "hoverinfo": "skip", "showlegend": False}
            traces.append(trace | faint)
            trace = _line(curve.means(_NUM_MEANS), label, color, mode="lines")
            notes.append(f"The strong line is the mean of each {_count(len(curve) / _NUM_MEANS)} points.")
        traces.append(trace)
    if not traces:
        return None
    layout = {
        "showlegend": len(curves) > 1,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {
            "title": {"text": unit},
            "exponentformat": exponents,
            **({"type": "log"} if logarithmic else {}),
        },
    }
    return Chart(name, title, tuple(traces), layout, " ".join(dict.fromkeys(notes)))


def stacked(name: str, title: str, curves: Mapping[str, Curve], *, unit: str, note: str = "") -> Chart | None:
    """Areas on top of each other, over the steps that all curves have; means of stretches where there are many."""
    shown = {label: curve for label, curve in curves.items() if len(curve.finite)}
    lengths = {len(curve) for curve in shown.values()}
    if not shown:
        return None
    is_thinned = max(lengths) > _NUM_STACKED
    traces = []
    for color, (label, curve) in enumerate(curves.items()):
        if label not in shown:
            continue
        drawn = curve.means(_NUM_STACKED) if is_thinned else curve
        trace = _line(drawn, label, color, mode="lines")
        trace["stackgroup"] = "all"
        trace["line"] = {"width": 0.5}
        traces.append(trace)
    if is_thinned:
        note = f"{note} Means of each {_count(max(lengths) / _NUM_STACKED)} points.".strip()
    layout = {
        "showlegend": len(curves) > 1,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
    }
    return Chart(name, title, tuple(traces), layout, note)


def over_time(
    name: str,
    title: str,
    points: Sequence[tuple[float, int | None]],
    marks: Sequence[tuple[float, int, str]],
    *,
    note: str = "",
) -> Chart | None:
    """Steps over the time of day (seconds since 1970): a line with gaps where a step is None, and marks with a text."""
    if not points:
        return None
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "steps done",
        "x": [_moment(time) for time, _ in points],
        "y": [step for _, step in points],
        "meta": {"color": 0},
        "line": {},
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "start",
        "x": [_moment(time) for time, _, _ in marks],
        "y": [step for _, step, _ in marks],
        "hovertext": [escape(text, quote=False) for _, _, text in marks],
        "hoverinfo": "text+x",
        "meta": {"color": 1},
        "marker": {"size": 11, "symbol": "diamond"},
    }
    layout = {
        "xaxis": {"title": {"text": "time (UTC)"}, "type": "date"},
        "yaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": bool(marks),
    }
    return Chart(name, title, (line, dots) if marks else (line,), layout, note)


def _line(curve: Curve, label: str, color: int, *, mode: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": escape(label, quote=False),  # plotly takes tags in a text for markup
        "x": curve.steps.tolist(),
        "y": [_rounded(value) for value in curve.values.tolist()],
        "meta": {"color": color},
        "line": {},
    }


def _rounded(value: float) -> float | None:
    """Six digits are more than a picture shows; None is a gap."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def time_points(times: Curve) -> list[tuple[float, int | None]]:
    """(seconds, step) of the `time` of metrics, few enough to draw."""
    places = np.linspace(0, max(0, len(times) - 1), min(len(times), MAX_POINTS // 2)).astype(int)
    chosen: list[int] = np.unique(places).tolist()
    return [
        (float(times.values[i]), int(times.steps[i])) for i in chosen if 0 <= times.values[i] < _LAST_MOMENT
    ]
