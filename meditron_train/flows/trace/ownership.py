"""Whether the parts of a tensor that ranks own make the whole of it, each element once."""

from __future__ import annotations

import math

Box = tuple[tuple[int, int], ...]
"""Of each dimension, the first element and the one after the last."""


def problem_of(name: str, shape: tuple[int, ...], boxes: list[Box]) -> str | None:
    """What is wrong with a tensor's owners, in words; None where each element has exactly one."""
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return f"{name}: elements {box} have two owners"
    owned = sum(math.prod(b - a for a, b in box) for box in boxes)
    if owned != math.prod(shape):
        return f"{name}: {owned:,} of {math.prod(shape):,} elements have an owner"
    return None
