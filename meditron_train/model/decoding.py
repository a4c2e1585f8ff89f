"""Texts that grow by what the model says: each pass reads their new tokens alone, on all stages of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from meditron_train.model.answers import ModelOnRanks
from meditron_train.model.attention import KeyValueCache
from meditron_train.model.cross_entropy import gather_vocabulary
from meditron_train.model.micro_batch import MicroBatch, Packed, Tokens


@dataclass
class _Group:
    """Texts that share micro-batches, on one copy of the model.

    Attributes:
        numbers: of the texts.
        places: of each text's tokens in the cache.
        num_cached: its size.
    """

    numbers: range
    cache: KeyValueCache = field(default_factory=KeyValueCache)
    places: dict[int, list[int]] = field(default_factory=dict)
    num_cached: int = 0

    def num_tokens(self, new: Mapping[int, Tokens]) -> int:
        return sum(len(new.get(number, ())) for number in self.numbers)

    def pack(self, model: ModelOnRanks, new: Mapping[int, Tokens], length: int) -> Packed:
        """The micro-batch of the new tokens."""
        batch = MicroBatch(self.num_cached)
        numbers = tuple(number for number in self.numbers if new.get(number))
        for number in numbers:
            seen = self.places.setdefault(number, [])
            places = batch.add(new[number], seen)
            batch.ask(places[-1:], (0,))
            seen.extend(places)
        packed = batch.packed(model.model, numbers, length, model.device, self.cache)
        self.num_cached += len(batch.tokens)
        return packed


class Decoding:
    """Some texts, and the keys and values of all that was read of them.

    The copies of the model share the texts; so do the stages of a pipeline, which work on different ones at a time.

    Args:
        model: this rank's part.
        num_texts: they are numbered from 0.
    """

    def __init__(self, model: ModelOnRanks, num_texts: int) -> None:
        self._model = model
        own, num_groups = range(num_texts)[model.copy :: model.num_copies], model.layout.pipeline
        self._groups = [_Group(own[group::num_groups]) for group in range(num_groups)]

    def next_logits(self, new: Mapping[int, Tokens]) -> dict[int, torch.Tensor]:
        """fp32 logits [vocabulary] of the token after each of these texts, on some ranks; together all. Collective.

        Args:
            new: what follows in each text that goes on, by its number; its beginning at first. The same on every rank.
        """
        model = self._model
        sizes = [group.num_tokens(new) for group in self._groups]
        if not any(sizes):
            return {}
        length = model.padded_length(sizes)
        batches = [group.pack(model, new, length) for group in self._groups]

        def collect(logits_RV: torch.Tensor, batch: Packed) -> dict[int, torch.Tensor]:
            whole_RV = gather_vocabulary(logits_RV, model.groups.tp)[:, : model.model.vocab_size].float()
            return dict(zip(batch.numbers, whole_RV.cpu(), strict=True))

        outputs = model.run(len(batches), lambda: iter(batches), length, collect)
        return {number: logits for output in outputs for number, logits in output.items()}
