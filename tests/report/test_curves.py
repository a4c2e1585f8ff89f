from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.report.curves import Curve, read_metrics


def curve(values) -> Curve:
    return Curve(np.arange(1, len(values) + 1), np.array(values, dtype=np.float64))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=900),
    st.integers(4, 50),
)
def test_thinning_keeps_ends_and_extremes(values, max_points):
    whole = curve(values)
    thin = whole.thinned(max_points)
    assert len(thin) <= max(max_points * 3 // 2 + 2, len(values) if len(values) <= max_points else 0)
    assert {1, len(values)} <= set(thin.steps.tolist())
    assert np.array_equal(whole.values[thin.steps - 1], thin.values, equal_nan=True)  # nothing is invented
    if len(whole.finite):
        assert thin.finite.values.min() == whole.finite.values.min()
        assert thin.finite.values.max() == whole.finite.values.max()
    assert (len(thin.finite) < len(thin)) == (len(whole.finite) < len(whole)), "a gap must stay visible"


def test_one_spike_among_many_steps_survives():
    values = np.sin(np.arange(100_000))
    values[54_321] = 40.0
    thin = curve(values).thinned()
    assert len(thin) <= 2002
    assert thin.values.max() == 40.0 and 54_322 in thin.steps


def test_means_are_of_the_finite_values():
    means = curve([1.0, 3.0, math.nan, 5.0, math.nan, math.nan]).means(3)
    assert means.values.tolist() == [2.0, 5.0]
    assert means.steps.tolist() == [1, 3]


def test_columns_of_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5, "mfu": null}\n{"step": 2, "loss": "NaN", "validation_loss.a": 3}\n'
        '{"step": 3, "loss": 2.0, "is": true, "word": "x"}\n'
    )
    metrics = read_metrics(path)
    assert metrics.curves.keys() == {"loss", "validation_loss.a"}
    assert metrics["loss"].steps.tolist() == [1, 2, 3] and math.isnan(metrics["loss"].values[1])
    assert metrics["loss"].finite.last == 2.0
    assert metrics.with_prefix("validation_loss.")["a"].last == 3.0
    assert metrics.problems == [] and metrics.last_step == 3
    assert len(metrics["nothing"]) == 0 and metrics["nothing"].last is None


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (b'{"step": 3, "lo', "torn"),
        (b"garbage\n", "1 lines of metrics.jsonl are not records"),
        (b'{"step": 2, "loss": 9}\n', "repeat earlier steps"),
        (b'{"step": "3", "loss": 9}\n', "are not records"),
        (b'{"loss": 9}\n', "are not records"),
        (b'{"step": -1, "loss": 9}\n', "are not records"),
        (b"[" * 100_000 + b"\n", "are not records"),
        (b"\xff\xfe\n", "are not records"),
        (b"\0" * (3 << 20) + b"\n", "are not records"),
    ],
)
def test_a_damaged_line_is_left_out_and_said(tmp_path, added, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n' + added)
    metrics = read_metrics(path)
    assert metrics["loss"].values.tolist() == [2.0, 1.0]
    assert len(metrics.problems) == 1 and said in metrics.problems[0]


def test_a_number_beyond_float64_and_many_keys(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {"step": 1, "huge": 10**400, **{f"key{number}": 1 for number in range(2000)}}
    path.write_text(json.dumps(record) + "\n")
    metrics = read_metrics(path)
    assert metrics["huge"].last == math.inf
    assert len(metrics.curves) == 512


def test_no_file_and_no_regular_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl").curves == {}
    (tmp_path / "metrics.jsonl").mkdir()
    assert "cannot be read" in read_metrics(tmp_path / "metrics.jsonl").problems[0]
