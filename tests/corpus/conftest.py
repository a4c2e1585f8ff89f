"""What makes the many small builds of the tests short."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def python_directories() -> Iterator[None]:
    """Worked out once: loguru asks for all of them at each log of a task, for half of the time of a small build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", functools.cache(sysconfig.get_path))
        yield
