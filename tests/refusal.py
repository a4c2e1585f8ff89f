"""How tests expect a mistake to be answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meditron_train.errors import MeditronError, UserError


@contextmanager
def refused(*parts: str, kind: type[MeditronError] = UserError) -> Iterator[None]:
    """The block raises `kind`, and its message contains every one of `parts`."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    for part in parts:
        assert part in str(caught.value)
