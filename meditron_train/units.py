"""Sizes in bytes, read from people and written for them."""

from __future__ import annotations

import re

from meditron_train.errors import UserError

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_num_bytes(text: str | int) -> int:
    """Bytes in a size like "5GB" (10^9), "4GiB" (2^30) or "500MB".

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?B?)\s*", str(text).upper())
    if not match or match.group(2) not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(
            f"{text!r} is not a size. Write for example 5GB (10^9 bytes), 4GiB (2^30 bytes) or 500MB"
        )
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def format_num_bytes(num_bytes: int) -> str:
    """For people, in the largest binary unit that gives at least 1: "1000 bytes", "4.00 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit.upper()]:
            return f"{num_bytes / _UNITS[unit.upper()]:.2f} {unit}"
    return f"{num_bytes} bytes"
