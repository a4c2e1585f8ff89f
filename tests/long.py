"""Which cases of a test are for `make test` and which for `make test-long`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases of a parametrized test, all but the `quick` ones marked long.

    Raises:
        ValueError: a quick case is not one of the cases.
    """
    cases = list(cases)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"{unknown} are not among the cases {cases}")
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]
