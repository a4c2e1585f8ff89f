from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from meditron_train.report.curves import Curve
from meditron_train.report.page.charts import over_steps, over_time, stacked, time_points


def curve(values) -> Curve:
    return Curve(np.arange(1, len(values) + 1), np.array(values, dtype=np.float64))


def check(chart) -> None:
    """plotly itself knows every word of the chart, but for the number of the color."""
    for trace in chart.traces:
        go.Figure([trace], chart.layout)


def test_a_curve_is_drawn_with_its_extremes_and_its_mean():
    values = np.ones(10_000)
    values[1234] = 50.0
    chart = over_steps("loss", "Loss", {"run": curve(values)}, smooth=True)
    faint, strong = chart.traces
    assert faint["meta"]["faint"] and max(faint["y"]) == 50.0
    assert len(faint["x"]) <= 2100 and len(strong["x"]) == 200
    assert "10,000 points, drawn by the least and the most of every stretch" in chart.note
    assert "the mean of each 50 points" in chart.note
    check(chart)


def test_what_is_not_finite_is_a_gap_and_counted():
    chart = over_steps("loss", "Loss", {"run": curve([1.0, math.nan, math.inf, 2.0])}, logarithmic=True)
    assert chart.traces[0]["y"] == [1.0, None, None, 2.0]
    assert "2 values are not finite" in chart.note
    check(chart)


def test_no_values_no_chart():
    assert over_steps("loss", "Loss", {}) is None
    assert over_steps("loss", "Loss", {"run": curve([math.nan])}) is None
    assert stacked("time", "Time", {"a": curve([])}, unit="s") is None
    assert over_time("time", "Time", [], []) is None
    assert time_points(curve([])) == []


def test_stacked_and_over_time():
    check(stacked("time", "Time", {"a": curve(np.ones(900)), "b": curve(np.ones(900))}, unit="ms"))
    check(over_time("life", "Life", [(0.0, 1), (1.0, None)], [(0.0, 0, "<b>why</b>")]))


def test_names_are_no_markup_for_plotly():
    chart = over_steps("loss", "Loss", {"<a href='x'>y</a>": curve([1.0])})
    assert chart.traces[0]["name"] == "&lt;a href='x'&gt;y&lt;/a&gt;"
    marks = over_time("life", "Life", [(0.0, 1)], [(0.0, 0, "<b>why</b>")]).traces[1]
    assert marks["hovertext"] == ["&lt;b&gt;why&lt;/b&gt;"]


def test_a_curve_keeps_its_color_and_its_name_where_others_have_no_values():
    curves = {"a": curve([math.nan]), "b": curve([1.0, math.nan]), "c": curve([])}
    for chart in (over_steps("mfu", "MFU", curves), stacked("time", "Time", curves, unit="ms")):
        (trace,) = chart.traces
        assert trace["meta"]["color"] == 1 and trace["name"] == "b" and chart.layout["showlegend"] is True
        check(chart)
    assert "b: 1 value is not finite" in over_steps("mfu", "MFU", curves).note
    assert over_steps("loss", "Loss", {"run": curve([1.0])}).layout["showlegend"] is False
