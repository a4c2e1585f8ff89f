"""Bytes that the pretended GPU holds, by part, and the most of each phase. A storage counts from its first tensor until
its last is gone, rounded up as CUDA's caching allocator does."""

from __future__ import annotations

import weakref
from typing import Any

from meditron_train.flows.trace.results import PARTS, PHASES, Peak

_BLOCK_BYTES = 512


class Ledger:
    def __init__(self) -> None:
        self._held: dict[int, tuple[int, str]] = {}  # address of a storage -> its bytes and part
        self._now = dict.fromkeys(PARTS, 0)
        self._total = 0
        self._peaks: dict[str, Peak] = {}
        self.enter(PHASES[0])

    def enter(self, phase: str) -> None:
        self._phase = phase
        self._peaks[phase] = Peak(phase, self._total, dict(self._now))

    def knows(self, storage: Any) -> bool:
        return storage._cdata in self._held

    def add(self, storage: Any, part: str) -> None:
        key = storage._cdata
        num_bytes = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self._held[key] = num_bytes, part
        self._now[part] += num_bytes
        self._total += num_bytes
        if self._total > self._peaks[self._phase].num_bytes:
            self._peaks[self._phase] = Peak(self._phase, self._total, dict(self._now))
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        num_bytes, part = self._held.pop(key)
        self._now[part] -= num_bytes
        self._total -= num_bytes

    def move(self, storage: Any, part: str) -> None:
        """What was taken for something else belongs to `part`."""
        key = storage._cdata
        if key not in self._held:
            return
        num_bytes, former = self._held[key]
        self._held[key] = num_bytes, part
        self._now[former] -= num_bytes
        self._now[part] += num_bytes

    def peaks(self) -> tuple[Peak, ...]:
        return tuple(self._peaks.values())
