"""How long this rank itself has worked, without its waiting for others."""

from __future__ import annotations

import time
from typing import Any

import torch

from meditron_train.native.devices import is_gpu


class Stopwatch:
    """Seconds of this rank's own work; on a GPU those of its stream, read without making the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = is_gpu(device)
        self._start: Any = 0.0
        self._end: Any = 0.0

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._start = self._end = self._now()

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float:
        """Between start and stop; on a GPU the work between must have been waited for."""
        return self._start.elapsed_time(self._end) / 1000 if self._on_gpu else self._end - self._start
