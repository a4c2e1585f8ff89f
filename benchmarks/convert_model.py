"""What `benchmarks.convert` has done in processes of their own, so that torch stays out of the one that measures.

    python -m benchmarks.convert_model create MODEL DIR [--sparse]
    python -m benchmarks.convert_model to-sharded HF_DIR DIR [MAX_RAM]
    python -m benchmarks.convert_model to-hf DIR HF_DIR [MAX_RAM]

`create` writes a Hugging Face directory of random bf16 weights; with --sparse, of holes: all its tensors are zero and
take no room. The other two are the conversions themselves, but every file is emptied as soon as it is finished. What
`to-sharded` wrote is filled with holes again, so that `to-hf` has a source: the hashes still hold, as all is zero.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from benchmarks.convert import MODELS
from meditron_train.checkpoint.convert.engine import Limits
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.stream import WrittenFile, write_file
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.workspace import Workspace
from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.directory import write_hf_files
from meditron_train.checkpoint.hf.plan import INDEX_NAME, plan_safetensors, safetensors_index
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor
from meditron_train.checkpoint.sharded.plan import plan_distcp
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import Piece, hf_shapes, sharded_pieces, tensor_specs
from meditron_train.config.model_config import ModelConfig
from meditron_train.units import parse_num_bytes


class Pattern:
    """Tensors by name whose values come from one block of normal numbers, each tensor's from another start."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self._shapes = shapes
        self._starts = {name: 977 * number for number, name in enumerate(shapes)}
        generator = torch.Generator().manual_seed(0)
        values = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
        self._num_values, self._values = (
            len(values),
            values.repeat(3),
        )  # a block of 8 MiB fits behind any start

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        start, stop = rows or (0, self._shapes[name][0])
        width = math.prod(self._shapes[name][1:])
        first = (self._starts[name] + start * width) % self._num_values
        found = self._values[first : first + (stop - start) * width]
        return found.view(stop - start, *self._shapes[name][1:])


def create(name: str, directory: Path, *, sparse: bool) -> None:
    sizes = MODELS[name]
    model = ModelConfig(
        **sizes,
        head_dim=sizes["hidden_size"] // sizes["num_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )
    directory.mkdir(parents=True)
    shapes = hf_shapes(model)
    files = plan_safetensors(
        PlannedTensor(name, torch.bfloat16, shape, (Piece(name, 0, shape[0], name),))
        for name, shape in shapes.items()
    )
    source = Pattern(shapes)
    for file in files:
        if sparse:
            write_holes(directory / file.name, file)
        else:
            write_file(directory / file.name, file, source, block_num_bytes=8 << 20)
    if index := safetensors_index(files):
        (directory / INDEX_NAME).write_text(index)
    write_hf_files(directory, model)


def write_holes(path: Path, plan: PlannedFile) -> None:
    """The planned file with all its tensors zero, as holes. The CRC-32 of the data is left out: nothing reads it."""
    with path.open("wb") as file:
        for tensor in plan.tensors:
            file.write(tensor.before)
            file.seek(tensor.num_bytes, os.SEEK_CUR)
            if tensor.after is not None:
                file.write(tensor.after(0))
        file.truncate(plan.num_bytes)


@contextmanager
def emptying_files() -> Iterator[None]:
    """While it lasts, conversions empty each file once it is finished, and do not ask for room for all of them."""
    record = Workspace.record

    def record_and_empty(work: Workspace, name: str, written: WrittenFile) -> None:
        record(work, name, written)
        os.truncate(work.directory / name, 0)

    with (
        mock.patch.object(Workspace, "record", record_and_empty),
        mock.patch("meditron_train.checkpoint.convert.workspace._check_free_space"),
    ):
        yield


def to_sharded(hf_directory: Path, checkpoint: Path, max_ram: str) -> None:
    with emptying_files():
        hf_to_sharded(hf_directory, checkpoint, limits=Limits(parse_num_bytes(max_ram)))
    source = ShardedSource(checkpoint, check=False)
    files = plan_distcp(
        PlannedTensor(
            spec.name,
            source.dtype(spec.name),
            source.shape(spec.name),
            tuple(sharded_pieces(spec, source.padded_vocab_size)),
        )
        for spec in tensor_specs(source.model)
    )
    for file in files:
        write_holes(checkpoint / file.name, file)


def to_hf(checkpoint: Path, hf_directory: Path, max_ram: str) -> None:
    with emptying_files():
        export_hf(checkpoint, hf_directory, limits=Limits(parse_num_bytes(max_ram)), max_shard_size="1GB")


if __name__ == "__main__":
    action, one, other, *more = sys.argv[1:]
    if action == "create":
        create(one, Path(other), sparse="--sparse" in more)
    elif action == "to-sharded":
        to_sharded(Path(one), Path(other), *(more or ["2GiB"]))
    else:
        to_hf(Path(one), Path(other), *(more or ["2GiB"]))
