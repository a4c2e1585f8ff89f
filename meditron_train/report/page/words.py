"""Numbers, durations and moments as a report writes them. Whatever is not known is a dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "–"


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits; thousands with commas, very small and very large ones with an exponent."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def amount(value: float | None) -> str:
    """A count in thousands (k), millions (M), billions (B) or trillions (T): "12.3 M"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for limit, divisor, unit in ((1e3, 1.0, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M"), (1e12, 1e9, " B")):
        if abs(value) < limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value / 1e12:.4g} T"


def percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """ "0.52 s", "1 min 5 s", "3 h 12 min", "2 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(seconds: float | None) -> str:
    """UTC, to the minute."""
    if seconds is None:
        return UNKNOWN
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
