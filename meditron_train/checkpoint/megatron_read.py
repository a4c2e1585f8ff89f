"""Read a sharded checkpoint of ours (megatron-core's `torch_dist` with meta.json) by tensors and rows, without process
groups or a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from meditron_train.checkpoint.hf_map import tensor_specs
from meditron_train.checkpoint.manifest import not_intact
from meditron_train.checkpoint.stored import Range, Shape
from meditron_train.checkpoint.torch_dist import TorchDistTensors
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError


class MegatronSource:
    """The model tensors of a sharded checkpoint directory.

    model: the ModelConfig in meta.json; meta: the whole of it; padded_vocab_size: rows of the embedding as stored.
    Opening reads `.metadata` and checks that every file is there and long enough, and that the tensors are those of
    the model; all problems come in one UserError (with check=False, `problems()` lists them). Optimizer state is
    ignored. read_once: what was read need not stay in the page cache.
    """

    def __init__(self, directory: str | Path, *, check: bool = True, read_once: bool = False) -> None:
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        try:
            self.model = ModelConfig.model_validate(self.meta["model"])
            self.padded_vocab_size = int(self.meta["padded_vocab_size"])
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise UserError(f"{self.directory / 'meta.json'} does not describe a model: {error}") from None
        self._tensors = TorchDistTensors(self.directory, read_once=read_once)
        if check and (problems := self.problems()):
            raise not_intact(self.directory, problems)

    @property
    def names(self) -> list[str]:
        """The model's tensors in the order of the layers."""
        return [spec.name for spec in tensor_specs(self.model)]

    def place(self, name: str) -> list[str]:
        """The files that hold the tensor."""
        return self._tensors.place(name)

    @property
    def all_names(self) -> list[str]:
        """Every tensor in the files, optimizer state included."""
        return self._tensors.names

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, or all (CPU, as stored: vocabulary padded). May be called from several
        threads. Raises UserError when a record is damaged."""
        return self._tensors.read(name, rows)

    def problems(self) -> list[str]:
        """What keeps the model from being read, one line each: files missing or cut off, tensors missing or of
        another shape than meta.json says. Empty when the checkpoint can be read. No tensor is read for it."""
        problems, stored = self._tensors.problems(), set(self._tensors.names)
        for spec in tensor_specs(self.model):
            shape = spec.padded_shape(self.padded_vocab_size)
            if spec.name not in stored:
                problems.append(f"{spec.name} is missing")
            elif self.shape(spec.name) != shape:
                problems.append(
                    f"{spec.name} has shape {list(self.shape(spec.name))}, meta.json says {list(shape)}"
                )
            elif not self.place(spec.name):
                problems.append(f"{spec.name} has no data")
        return problems


def is_megatron_directory(directory: str | Path) -> bool:
    """Whether `directory` looks like a sharded checkpoint (finished or not)."""
    directory = Path(directory)
    return any((directory / name).is_file() for name in ("meta.json", ".metadata", "metadata.json"))


def hint_at_checkpoint(directory: Path) -> str:
    """ " Did you mean …?" with the newest finished checkpoint below a run directory, or nothing."""
    for pattern in ("checkpoints/step_*/meta.json", "step_*/meta.json"):
        if found := sorted(path.parent for path in directory.glob(pattern) if path.parent.suffix != ".tmp"):
            return f" Did you mean {found[-1]}?"
    return ""


def read_meta(directory: str | Path) -> dict[str, Any]:
    """`meta.json` of a sharded checkpoint. Raises UserError when it is missing or not JSON."""
    directory = Path(directory)
    path = directory / "meta.json"
    if directory.name.endswith(".tmp"):
        raise UserError(f"{directory} was never finished (its name ends in .tmp). Use an earlier checkpoint.")
    if not path.is_file():
        message = f"{path} does not exist, so {directory} is not a finished checkpoint of this program."
        raise UserError(message + hint_at_checkpoint(directory))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(meta, dict) or not str(meta.get("format", "")).startswith("meditron-train/"):
        raise UserError(f'{path} does not say "format": "meditron-train/1".')
    return meta
