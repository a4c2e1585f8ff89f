"""Packed micro-batches of questions: tokens that also see others before them, of this pass or of an earlier one.

Legend: T packed tokens, S keys that were read earlier, R predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from meditron_train.config.model_config import ModelConfig
from meditron_train.model.attention import KeyValueCache, PackedSequence
from meditron_train.model.rope import cos_sin
from meditron_train.native import AttentionSpan, Rotation

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A packed micro-batch.

    Attributes:
        numbers: of the questions in it, among all.
        tokens_T: int64.
        rows_R, labels_R: int64: the tokens whose next ones are predicted, and those.
        sequence: what the layers need to know.
    """

    numbers: tuple[int, ...]
    tokens_T: torch.Tensor
    rows_R: torch.Tensor
    labels_R: torch.Tensor
    sequence: PackedSequence


@dataclass
class MicroBatch:
    """A micro-batch that is put together, document by document.

    Attributes:
        num_cached: S, keys of earlier passes, which have the places before those of the tokens.
    """

    num_cached: int = 0
    tokens: list[int] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)  # of the queries
    _keys: list[int] = field(default_factory=list)  # the place of each key
    _key_positions: list[int] = field(default_factory=list)
    _query_lengths: list[int] = field(default_factory=list)
    _key_lengths: list[int] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _labels: list[int] = field(default_factory=list)

    def add(self, new: Sequence[int], seen: Sequence[int]) -> range:
        """A document of `new` tokens that also sees the keys at the places `seen`, its beginning; returns the places
        of the new ones."""
        first = self.num_cached + len(self.tokens)
        places = range(first, first + len(new))
        self.tokens.extend(new)
        self._positions.extend(range(len(seen), len(seen) + len(new)))
        self._keys.extend([*seen, *places])
        self._key_positions.extend(range(len(seen) + len(new)))
        self._query_lengths.append(len(new))
        self._key_lengths.append(len(seen) + len(new))
        return places

    def ask(self, places: Sequence[int], labels: Sequence[int]) -> None:
        """What follows the tokens at these places is wanted, and what really does."""
        self._rows += [place - self.num_cached for place in places]
        self._labels += labels

    def packed(
        self,
        model: ModelConfig,
        numbers: tuple[int, ...],
        length: int,
        device: torch.device,
        cache: KeyValueCache | None = None,
    ) -> Packed:
        """The whole, padded to `length` tokens where it is shorter."""
        if len(self.tokens) < length:
            self.add([0] * (length - len(self.tokens)), range(0))
        num_keys = len(self._keys)
        cos_PC, sin_PC = cos_sin(model, torch.arange(max(self._key_lengths), device=device))
        on_device = partial(torch.tensor, dtype=torch.int64, device=device)
        queries, keys = _boundaries(self._query_lengths), _boundaries(self._key_lengths)
        sequence = PackedSequence(
            qkv_format="thd",
            spans=(AttentionSpan(0, len(self.tokens), 0, num_keys, queries, keys),),
            rotations=(Rotation(cos_PC, sin_PC, on_device(self._positions), on_device(self._key_positions)),),
            key_index=on_device(self._keys),
            cache=cache,
        )
        return Packed(
            numbers, on_device(self.tokens), on_device(self._rows), on_device(self._labels), sequence
        )


def _boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
