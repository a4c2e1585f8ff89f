"""Keeps the many small builds of the tests short."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def python_directories() -> Iterator[None]:
    """Worked out once: loguru asks for all of them at every log that a task opens, half the time of a small build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", functools.cache(sysconfig.get_path))
        yield
