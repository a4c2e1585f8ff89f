"""Checkpoints of another Megatron in `torch_dist`: what lies beside the tensors, and their common names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.files.pickled import shown
from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.megatron.rank_files import (
    OBJECTS,
    attributes,
    common_name,
    iteration_of,
    load_megatron_pickle,
)
from meditron_train.checkpoint.sharded.torch_dist import TorchDistTensors
from meditron_train.errors import UserError
from meditron_train.files import read_json

_MAX_JSON_BYTES = 1 << 20
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class CommonState:
    """What a `torch_dist` checkpoint keeps beside the tensors."""

    args: dict[str, Any]
    iteration: int | None
    content: dict[str, Any]


def load_common(directory: Path) -> CommonState:
    """The common state: in common.pt, or since megatron-core 0.19 an object among the tensors.

    Raises:
        UserError: it is missing, damaged, or could run code.
    """
    path = directory / "common.pt"
    if path.is_file():
        content = load_megatron_pickle(path)
    else:
        parts = TorchDistTensors(directory, read_once=True).read_object("common_state", OBJECTS)
        if type(parts) is not list or not parts:
            raise UserError(
                f"{path} is missing, and .metadata names no common_state: the checkpoint is not complete"
            )
        content = parts[0]
    content = content if isinstance(content, dict) else {}
    return CommonState(attributes(content.get("args")), iteration_of(content), content)


def check_format(directory: Path) -> None:
    """Check that metadata.json says torch_dist.

    Raises:
        UserError: it says another format; the message names it.
    """
    path = directory / "metadata.json"
    if not path.is_file():
        return
    said = read_json(path, _MAX_JSON_BYTES)
    found = said.get("sharded_backend") if isinstance(said, dict) else None
    if found != "torch_dist":
        raise UserError(
            f"{directory} is in the format {shown(found)}, but only torch and torch_dist are read. Load it with the "
            "program that wrote it and save it in one of these (Megatron-LM: --ckpt-convert-format torch_dist)"
        )


class RenamedTensors:
    """Tensors of a `torch_dist` checkpoint under megatron-core's local names."""

    def __init__(self, tensors: TorchDistTensors, stored_name: Mapping[str, str]) -> None:
        self._tensors, self._stored_name = tensors, stored_name

    @property
    def names(self) -> list[str]:
        return list(self._stored_name)

    def problems(self) -> list[str]:
        return self._tensors.problems()

    def place(self, name: str) -> list[str]:
        return self._tensors.place(self._stored_name[name]) if name in self._stored_name else []

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(self._stored_name.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._stored_name.get(name, name))

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self._tensors.read(self._stored_name.get(name, name), rows)


def renamed(tensors: TorchDistTensors) -> RenamedTensors:
    stored_name = {}
    for name in tensors.names:
        # Some programs put "model." or "module." before every name.
        common = common_name(name.removeprefix("model."))
        if common is not None and common.startswith(MODEL_PARTS):
            stored_name[common] = name
    return RenamedTensors(tensors, stored_name)
