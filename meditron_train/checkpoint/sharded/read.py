"""Read a sharded checkpoint of ours (megatron-core's `torch_dist` with meta.json) by tensors and rows, without process
groups or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.config import refuse_adapter
from meditron_train.checkpoint.manifest import not_intact
from meditron_train.checkpoint.sharded.checked_reader import read_common
from meditron_train.checkpoint.sharded.torch_dist import TorchDistTensors
from meditron_train.checkpoint.tensor_map import tensor_specs
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, read_json


class ShardedSource:
    """The model tensors of a sharded checkpoint directory. Optimizer state is ignored.

    Opening reads `.metadata` and checks that every file is there and long enough, and that the tensors are
    those of the model.

    Args:
        directory: the checkpoint.
        check: False: problems do not end the opening; `problems()` lists them.
        read_once: what was read need not stay in the page cache.

    Attributes:
        model: the ModelConfig in meta.json.
        meta: the whole of meta.json.
        padded_vocab_size: rows of the embedding as stored.

    Raises:
        UserError: lists all problems.
    """

    def __init__(self, directory: str | Path, *, check: bool = True, read_once: bool = False) -> None:
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        if "lora" in self.meta:
            raise UserError(
                f"{self.directory} holds a LoRA adapter only. Merge it into its base model first "
                "(`convert merge-adapter`)"
            )
        try:
            self.model = ModelConfig.model_validate(self.meta["model"])
            self.padded_vocab_size = int(self.meta["padded_vocab_size"])
        except (KeyError, TypeError, ValueError, OverflowError, ValidationError) as error:
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
        """Rows [start, stop) of the tensor, or all (CPU, as stored: vocabulary padded). Any thread may call it.

        Raises:
            UserError: a record is damaged.
        """
        return self._tensors.read(name, rows)

    def pickle_problems(self) -> list[str]:
        """Pickles of the checkpoint that are damaged or could run code, one line each: common.pt and every record."""
        problems = self._tensors.pickle_problems()
        try:
            read_common(self.directory)
        except UserError as error:
            problems.append(str(error))
        return problems

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


def is_sharded_directory(directory: str | Path) -> bool:
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
    """`meta.json` of a sharded checkpoint.

    Raises:
        UserError: it is missing or not JSON.
    """
    directory = Path(directory)
    path = directory / "meta.json"
    if directory.name.endswith(".tmp"):
        raise UserError(f"{directory} was never finished (its name ends in .tmp). Use an earlier checkpoint")
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if not path.is_file():
        refuse_adapter(directory)
        message = f"{path} does not exist, so {directory} is not a finished checkpoint of this program."
        raise UserError(message + hint_at_checkpoint(directory))
    meta = read_json(path)
    if not isinstance(meta, dict) or not str(meta.get("format", "")).startswith("meditron-train/"):
        raise UserError(f'{path} does not say "format": "meditron-train/1"')
    return meta
