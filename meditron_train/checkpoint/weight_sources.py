"""Where initial weights come from when not simply from a file: seeded random ones, and a grown vocabulary.

Both speak like `HFSource`: tensors by Hugging Face name, read by rows and columns. So a rank takes its slice of a
random tensor as it would of a stored one, and fresh weights do not depend on the layout.
"""

from __future__ import annotations

import hashlib

import torch

from meditron_train.checkpoint.files.stored import Range, Shape, row_blocks
from meditron_train.checkpoint.tensor_map import TensorSource, hf_shapes
from meditron_train.config.model_config import ModelConfig

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def _part(tensor: torch.Tensor, rows: Range | None, columns: Range | None) -> torch.Tensor:
    if rows is not None:
        tensor = tensor[rows[0] : rows[1]]
    return tensor if columns is None else tensor[:, columns[0] : columns[1]]


class RandomSource:
    """Fresh weights as transformers makes them: norms 1, biases 0, matrices normal with std `initializer_range`.

    Each tensor is a function of the seed and its name alone. fp32 on CPU; a read makes the whole tensor.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._shapes = hf_shapes(model)
        self._std = model.initializer_range
        self._seed = seed

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return _part(torch.full(shape, 0.0 if name.endswith(".bias") else 1.0), rows, columns)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return _part(torch.empty(shape).normal_(std=self._std, generator=generator), rows, columns)


class GrownVocabulary:
    """`source` with rows added to its embedding and output layer for new tokens.

    A new row is the mean of the old ones (Hewitt 2021, "Initializing new word embeddings"), so that a new token
    starts with an average probability instead of a large one.
    """

    def __init__(self, source: TensorSource, vocab_size: int) -> None:
        self._source = source
        self._vocab_size = vocab_size

    @property
    def names(self) -> list[str]:
        return list(self._source.names)

    def shape(self, name: str) -> Shape:
        shape = self._source.shape(name)
        return (self._vocab_size, *shape[1:]) if name in VOCABULARY_TENSORS else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        if name not in VOCABULARY_TENSORS:
            return self._source.read(name, rows, columns)
        num_old = self._source.shape(name)[0]
        start, stop = rows or (0, self._vocab_size)
        parts = []
        if start < num_old:
            parts.append(self._source.read(name, (start, min(stop, num_old)), columns))
        if stop > num_old:
            blocks = row_blocks(self._source.shape(name), self.dtype(name))
            sums = [self._source.read(name, block, columns).double().sum(dim=0) for block in blocks]
            mean = (torch.stack(sums).sum(dim=0, keepdim=True) / num_old).to(self.dtype(name))
            parts.append(mean.expand(stop - max(start, num_old), -1))
        return torch.cat(parts)
