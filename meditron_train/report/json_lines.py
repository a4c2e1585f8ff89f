"""Files of one JSON object per line, appended to by a run that may be killed at any moment.

JSON has no NaN and no infinities, and many readers refuse the bare words Python would write. They are written
as the strings "NaN", "Infinity" and "-Infinity", and read back as floats, so every line is strict JSON and
nothing is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meditron_train.log import get_logger

_log = get_logger(__name__)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON without its newline. Numbers of numpy and torch (0-d) are written as
    numbers."""
    return json.dumps(_encodable(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def decode_line(line: str | bytes) -> dict[str, Any]:
    """The inverse of encode_line.

    Raises:
        ValueError: the line is not one JSON object.
    """
    record = _decoded(json.loads(line))
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {line!r:.80}")
    return record


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records; [] without a file. A last line without its newline is torn and ignored; a line in the
    middle that is not JSON (a disk was full) is left out with a warning that names it."""
    if not path.exists():
        return []
    records = []
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            records.append(decode_line(line))
        except ValueError:
            _log.warning("%s, line %d is not a JSON object and is left out", path, number)
    return records


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
