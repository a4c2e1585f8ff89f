"""Joint tensors (q, k, v; gate, up) seen under the Hugging Face names of their parts."""

from __future__ import annotations

from collections.abc import Collection

import torch

from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.megatron.source import MegatronSource
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import Piece, TensorSpec, hf_pieces, tensor_specs
from meditron_train.errors import UserError


class HFView:
    """The Hugging Face tensors inside of joint ones, each read out of them row by row.

    `read` may be called from several threads; every method fails with UserError on a damaged tensor.
    """

    def __init__(self, source: ShardedSource | MegatronSource, stored: Collection[str]) -> None:
        self._source = source
        self.model = source.model
        specs = [spec for spec in tensor_specs(self.model) if spec.name in stored]
        self._spec_of: dict[str, TensorSpec] = {name: spec for spec in specs for name in spec.hf_names}
        self.names = list(self._spec_of)

    def shape(self, name: str) -> Shape:
        spec = self._spec_of[name]
        stored = self._source.shape(spec.name)
        if stored != spec.padded_shape(self._source.padded_vocab_size):
            raise UserError(f"{spec.name} has shape {list(stored)}, which is not that of meta.json's model")
        return spec.hf_shapes[spec.hf_names.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._spec_of[name].name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """A fresh CPU tensor: rows [start, stop) of dimension 0, or all."""
        start, stop = rows or (0, self.shape(name)[0])
        parts, first = [], 0  # first: the row of the Hugging Face tensor at which the piece begins
        for piece in hf_pieces(self._spec_of[name], name):
            low, high = max(start, first), min(stop, first + piece.num_rows)
            if low < high:
                parts.append(self._read_piece(piece, low - first, high - first))
            first += piece.num_rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_piece(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        assert piece.source is not None
        return self._source.read(piece.source, rows=(piece.start + start, piece.start + stop))
