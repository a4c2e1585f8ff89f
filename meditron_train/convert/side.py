"""A model on disk, in either format, seen as Hugging Face tensors: what `verify` and `inspect` look at."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from meditron_train.checkpoint.export import HF_SUBDIRECTORY
from meditron_train.checkpoint.hf_config import read_hf_config
from meditron_train.checkpoint.hf_map import TensorSpec, is_ignored, tensor_specs, to_hf
from meditron_train.checkpoint.hf_read import HFSource, is_hf_directory
from meditron_train.checkpoint.megatron_read import MegatronSource, hint_at_checkpoint, is_megatron_directory
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

Shape = tuple[int, ...]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Side(Protocol):
    """One side of a comparison. `read` raises UserError for a damaged tensor."""

    directory: Path
    model: ModelConfig
    hf_files: Path  # where config.json and the tokenizer lie
    names: list[str]

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


class HFSide:
    """A Hugging Face directory. Tensors are taken as they are: nothing is checked against config.json."""

    format = "hugging-face"

    def __init__(self, directory: Path) -> None:
        self.directory = self.hf_files = directory
        self.source = HFSource(directory)
        self.model = read_hf_config(directory)
        self.names = [name for name in self.source.names if not is_ignored(name)]
        if self.model.tie_embeddings and _HEAD in self.names and self._head_is_the_embedding():
            self.names.remove(_HEAD)  # stored or left out, it is the same model

    def _head_is_the_embedding(self) -> bool:
        if self.source.shape(_HEAD) != self.source.shape(_EMBEDDING):
            return False
        head, embedding = self.source.read(_HEAD), self.source.read(_EMBEDDING)
        return head.dtype == embedding.dtype and torch.equal(
            head.view(torch.uint8), embedding.view(torch.uint8)
        )

    def shape(self, name: str) -> Shape:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name)


class MegatronSide:
    """A sharded checkpoint. The parts of a joint tensor (q, k, v; gate, up) are cut out of one read."""

    format = "sharded"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf_files = directory / HF_SUBDIRECTORY
        self.source = MegatronSource(directory, check=False)
        self.model = self.source.model
        stored = set(self.source.all_names)
        specs = [spec for spec in tensor_specs(self.model) if spec.name in stored]
        self._spec_of: dict[str, TensorSpec] = {name: spec for spec in specs for name in spec.hf_names}
        self.names = list(self._spec_of)
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def shape(self, name: str) -> Shape:
        spec = self._spec_of[name]
        stored = self.source.shape(spec.name)
        if stored != spec.padded_shape(self.source.padded_vocab_size):
            raise UserError(f"{spec.name} has shape {list(stored)}, which is not that of meta.json's model")
        return spec.hf_shapes[spec.hf_names.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._spec_of[name].name)

    def read(self, name: str) -> torch.Tensor:
        spec = self._spec_of[name]
        if self._last[0] != spec.name:
            self._last = ("", {})  # let go of the previous tensor before the next is read
            self._last = (spec.name, to_hf(spec, self.source.read(spec.name)))
        return self._last[1][name]


def open_side(directory: str | Path) -> HFSide | MegatronSide:
    """Open either format. Raises UserError when the directory is neither, or damaged beyond naming its tensors."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    if is_hf_directory(directory):
        return HFSide(directory)
    if is_megatron_directory(directory):
        return MegatronSide(directory)
    raise UserError(
        f"{directory} is not a model: neither config.json (Hugging Face) nor meta.json (sharded checkpoint)."
        + hint_at_checkpoint(directory)
    )
