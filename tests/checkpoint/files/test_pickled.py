"""Pickles read as data: what Python's own reader gives for plain data, and nothing for anything else."""

from __future__ import annotations

import collections
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meditron_train.checkpoint.files import pickled
from meditron_train.checkpoint.files.pickled import (
    ORDERED_DICT,
    SIZE,
    Allowed,
    DamagedPickle,
    ForbiddenGlobal,
    Opaque,
    opaque,
    read_pickle,
    shown,
    spelled,
)
from tests.checkpoint.files.payloads import (
    FORBIDDEN,
    PLANTED,
    UNFIT,
    forbidden,
    name,
    old_name,
    text,
    unfit,
)

NAMES: Allowed = {
    ("collections", "OrderedDict"): ORDERED_DICT,
    ("torch", "Size"): SIZE,
    ("torch", "float32"): "float32",
    ("builtins", "getattr"): opaque("builtins", "getattr"),
    ("torch.distributed.checkpoint.metadata", "Metadata"): opaque("m", "Metadata"),
    ("torch._tensor", "_rebuild_from_type_v2"): opaque("torch._tensor", "_rebuild_from_type_v2"),
    ("collections", "defaultdict"): opaque("collections", "defaultdict"),
    ("builtins", "dict"): opaque("builtins", "dict"),
}
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS | st.binary() | st.sets(st.integers() | st.text()) | st.frozensets(st.tuples(SCALARS, SCALARS)),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5) | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


OLD_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(SCALARS, inner) | st.tuples(inner, inner)
)


def assert_read_as_python_does(value: Any, protocol: int) -> None:
    raw = pickle.dumps(value, protocol=protocol)
    assert read_pickle(raw, {}) == (value, len(raw))


@given(VALUES, st.sampled_from([4, 5]))
@settings(max_examples=50, deadline=None)
def test_plain_data_is_what_python_reads(value: Any, protocol: int) -> None:
    assert_read_as_python_does(value, protocol)


@given(OLD_VALUES)
@settings(max_examples=50, deadline=None)
def test_plain_data_of_protocol_2_is_what_python_reads(value: Any) -> None:
    assert_read_as_python_does(value, 2)


@pytest.mark.long
@given(st.tuples(VALUES, st.sampled_from([4, 5])) | st.tuples(OLD_VALUES, st.just(2)))
@settings(max_examples=1000, deadline=None)
def test_plain_data_is_what_python_reads_1000_times(case: tuple[Any, int]) -> None:
    assert_read_as_python_does(*case)


def test_what_is_shared_stays_shared_and_pickles_follow_each_other() -> None:
    shared = [1]
    raw = pickle.dumps((shared, {"again": shared})) + pickle.dumps("next")
    (first, second), end = read_pickle(raw, {})
    assert first is second["again"]
    assert read_pickle(raw, {}, None, end) == ("next", len(raw))


def test_listed_names_give_what_the_list_says() -> None:
    ordered = pickle.dumps(collections.OrderedDict(a=1), protocol=2)
    assert read_pickle(ordered, NAMES)[0] == {"a": 1}
    counted = pickle.dumps(collections.defaultdict(None, a=1))
    found = read_pickle(counted, NAMES)[0]
    assert isinstance(found, Opaque) and found.name == "collections.defaultdict"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Touched by any payload that runs."""
    planted = tmp_path / "planted"
    planted.mkdir()
    marker = tmp_path / "was_run"
    (planted / f"{PLANTED}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(planted)
    return marker


@pytest.mark.parametrize("payload", FORBIDDEN)
def test_names_beyond_the_list_are_refused_by_name(marker: Path, payload: str) -> None:
    with pytest.raises(ForbiddenGlobal, match=r"^[\w.]+$"):
        read_pickle(forbidden(marker)[payload], NAMES)
    assert not marker.exists() and PLANTED not in sys.modules


@pytest.mark.parametrize("payload", UNFIT)
def test_what_is_no_data_is_damage_at_once(payload: str) -> None:
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedPickle):
        read_pickle(unfit()[payload], NAMES)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB


def test_a_pickle_of_very_many_objects_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_MAX_OBJECTS", 5_000)
    with pytest.raises(DamagedPickle, match="more than 5,000 objects"):
        read_pickle(b"]" * 6_000, {})


def test_objects_on_the_list_do_nothing() -> None:
    """State, items and arguments are kept or dropped, never used."""
    raw = (
        name("torch.distributed.checkpoint.metadata", "Metadata")
        + b")R}"
        + text("__class__")
        + name("collections", "defaultdict")
        + b"sb(K\1K\2u(K\3e."
    )
    found = read_pickle(raw, NAMES)[0]
    assert type(found) is Opaque and found.name == "m.Metadata" and list(found.state) == ["__class__"]
    assert not callable(found)


def test_values_are_spelled_in_one_short_line_at_once() -> None:
    deep: Any = ()
    for _ in range(60):
        deep = (deep, deep)
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    endless: list[Any] = []
    endless.append(endless)
    for value in (
        deep,
        nested,
        endless,
        "x" * 10**8,
        b"x" * 10**8,
        10**5000,
        {1: deep},
        {(1,): nested},
        [deep] * 10**6,
    ):
        start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(shown(value)) < 100 and len(spelled(value)) < 100
        assert time.process_time() - start < 0.1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1000  # KiB
    plain: Any
    for plain in (
        None,
        True,
        -1,
        0.5,
        "a",
        b"a",
        [],
        [1],
        (),
        (1,),
        (1, "b"),
        {},
        {"a": [1]},
        {3},
        frozenset({3}),
    ):
        assert spelled(plain) == repr(plain)
    assert (shown("a"), shown([1, "a"]), shown(ValueError("no"))) == ("a", "[1, 'a']", "no")


def test_names_are_shown_in_printable_characters() -> None:
    assert shown("a\x1b[31m\ud800b") == "a\\x1b[31m\\ud800b"
    assert len(shown("x" * 1000)) < 100
    with pytest.raises(ForbiddenGlobal, match=r"^os\\x1b\.system$"):
        read_pickle(old_name("os\x1b", "system") + b".", {})
