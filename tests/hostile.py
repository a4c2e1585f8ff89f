"""Hostile input for readers of files that another program or person wrote: whole files changed so that they keep their
structure, and the bounds that a reader has to keep."""

from __future__ import annotations

import pickle
import random
import resource
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from meditron_train.errors import UserError

# Processor time, as other programs may run beside. An idle machine of today needs less than a second for each; what is
# to be found here takes minutes, so that slow machines get some air.
MAX_SECONDS, MAX_KIB = 6.0, 500_000

# Values that readers stumbled over: of other types, of other sizes, nested, not finite, and names that drive terminals.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**9, 2**62, -(2**62), 10**400, 0.5, 80.0, float("nan"), float("inf"), -0.0,
    "", "x", "1", "²", "\x1b[31m", "\ud800", "../../etc/passwd", "/dev/zero", "9" * 5000, [], [1], [[]], {}, {"a": 1},
    [2**62, 0, 2**62], [0] * 1000, list(range(20)), {"type": "linear", "factor": "x"}, "float8", "torch.int4",
]  # fmt: skip


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie inside a structure."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, item in inside for found in places_in(item, (*path, key))]


def changed(value: Any, dice: random.Random) -> Any:
    """A copy with one or two places changed: another value, nothing, twice, or another key."""
    copy = pickle.loads(pickle.dumps(value))
    for _ in range(dice.choice((1, 1, 2))):
        places = [place for place in places_in(copy) if place]
        if not places:
            break
        *parents, last = dice.choice(places)
        holder = copy
        for key in parents:
            holder = holder[key]
        what = dice.random()
        if what < 0.7:
            holder[last] = pickle.loads(pickle.dumps(dice.choice(ODD)))
        elif what < 0.85:
            del holder[last]
        elif isinstance(holder, dict):
            holder[dice.choice(["x", "\x1b[2J", "", "layers", str(last) + "\n"])] = holder.pop(last)
        else:
            holder.append(holder[last])
    return copy


def spoiled(raw: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled, or replaced by extreme numbers."""
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(max(1, len(data)))
        what = dice.random()
        if what < 0.4 and data:
            data[at] = dice.randrange(256)
        elif what < 0.6:
            extreme = dice.choice(
                (b"\xff" * 8, struct.pack("<Q", 1 << 62), struct.pack("<I", 1 << 30), b"\0" * 8)
            )
            data[at : at + len(extreme)] = extreme
        elif what < 0.75:
            del data[at:]
        elif what < 0.9:
            del data[at : at + dice.randrange(1, 9)]
        else:
            data[at:at] = data[at : at + dice.randrange(1, 99)]
    return bytes(data)


def check(read: Callable[[], object]) -> None:
    """Success or UserError, in time and memory."""
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(UserError):
        read()
    assert time.process_time() - start < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MAX_KIB


def attempt_many(attempt: Callable[[random.Random], None], number: int, *, derandomize: bool) -> None:
    """`attempt` with `number` different dice; the same each time where `derandomize`."""

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=(
            Phase.generate,
        ),  # dice do not get simpler, and an example that takes long is not to be repeated
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False, note_method_calls=False))
    def examples(dice: random.Random) -> None:
        attempt(random.Random(dice.getrandbits(64)))

    examples()
