"""The weighted average of several checkpoints as a Hugging Face directory, in blocks of rows.

Each element is sum(weight x value), taken in float64 in the order of the checkpoints, rounded to float32 and from there
to the dtype asked for. For n checkpoints the float32 value differs from the average of the stored values by at most

    2^-24 |average| + (n + 1) 2^-53 sum(|weight x value|)

to first order (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1; one rounding each for the
weight and the product, n - 1 for the sum): the rounding to float32 alone, unless the terms cancel nearly to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.convert.engine import NO_LIMITS, Limits, Progress
from meditron_train.checkpoint.convert.merge_weights import MergeWeights, needs_steps, parse_weights
from meditron_train.checkpoint.convert.source_files import SourceFiles, files_identity
from meditron_train.checkpoint.convert.stream import first_nonfinite
from meditron_train.checkpoint.convert.to_hf import write_hf_tensors
from meditron_train.checkpoint.convert.workspace import Alone, Ranks, require_absent
from meditron_train.checkpoint.dtypes import dtype_name, parse_dtype, require_convertible
from meditron_train.checkpoint.files.stored import Range, Shape, Tensors
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY, read_generation_config
from meditron_train.checkpoint.hf.read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.hf_view import HFView
from meditron_train.checkpoint.manifest import MANIFEST_NAME, read_manifest, require_intact
from meditron_train.checkpoint.planned import PlannedTensor
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import Piece, hf_shapes
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer, compare_tokenizers
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import overlap, sha256_file
from meditron_train.units import parse_num_bytes

_CHUNK_ELEMENTS = 1 << 17  # summed at a time: 1 MiB of float64, which stays in a core's cache


def merge_checkpoints(
    checkpoints: Sequence[str | Path],
    hf_directory: str | Path,
    *,
    weights: str = "uniform",
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> MergeWeights:
    """Write the average of checkpoints, each a Hugging Face directory or a sharded one, as a Hugging Face directory.

    Configuration and tokenizer must be the same everywhere; generation_config.json is the first checkpoint's. The
    manifest names the parents with their hashes. An interrupted call is continued by the next one with the same
    arguments.

    Args:
        weights: as `parse_weights` takes them.
        dtype, max_shard_size, limits, ranks, progress: as of `export_hf`.

    Returns:
        The weights used.

    Raises:
        UserError: a checkpoint differs from the first, is damaged or not finite, or the output exists; nothing is left
            behind then.
    """
    directories = [Path(checkpoint) for checkpoint in checkpoints]
    target, max_num_bytes = parse_dtype(dtype), parse_num_bytes(max_shard_size)
    _require_several(directories)
    require_absent(hf_directory, *directories)
    inputs = SourceFiles(*directories)
    parents = [_open(directory) for directory in directories]
    first = parents[0]
    steps = [_step(parent, weights) for parent in parents] if needs_steps(weights) else []
    _require_different(parents, steps)
    chosen = parse_weights(weights, len(parents), steps)
    for other in parents[1:]:
        _require_alike(first, other)
    check_tokenizer(first.hf_files, first.model.vocab_size)
    read_generation_config(first.hf_files)
    tensors = [
        PlannedTensor(name, target or _common_dtype(parents, name), shape, (Piece(name, 0, shape[0], name),))
        for name, shape in hf_shapes(first.model).items()
    ]
    for tensor in tensors:
        for parent in parents:
            require_convertible(tensor.name, parent.tensors.dtype(tensor.name), target)
    described: list[dict[str, Any]] = []
    (ranks or Alone()).on_first(lambda: described.extend(_checked(parents, chosen)))
    write_hf_tensors(
        _Average(parents, chosen.values, limits.allow_nonfinite),
        tensors,
        first.model,
        inputs,
        hf_directory,
        first.hf_files,
        max_num_bytes=max_num_bytes,
        identity={
            "dtype": "keep" if target is None else dtype_name(target),
            "merge": [
                [weight, files_identity(d)] for weight, d in zip(chosen.values, directories, strict=True)
            ],
        },
        manifest={
            "source": {
                "format": "merge",
                "weights": chosen.rule,
                "parents": described,
            },
            "cast": None if target is None else dtype_name(target),
        },
        expected=None,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )
    return chosen


@dataclass(frozen=True)
class _Parent:
    """A checkpoint that is averaged.

    Attributes:
        hf_files: where its tokenizer lies.
        step: None where it does not tell.
    """

    directory: Path
    format: str
    model: ModelConfig
    tensors: Tensors
    hf_files: Path
    step: int | None


class _Average:
    """The weighted sum of the parents' tensors, float32, by Hugging Face name."""

    def __init__(self, parents: Sequence[_Parent], weights: Sequence[float], allow_nonfinite: bool) -> None:
        self._terms = list(zip(parents, weights, strict=True))
        self._allow_nonfinite = allow_nonfinite

    def shape(self, name: str) -> Shape:
        return self._terms[0][0].tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop), or all.

        Raises:
            UserError: a parent's value is NaN or infinite, and that is not allowed.
        """
        shape = self.shape(name)
        start, stop = rows or (0, shape[0])
        result = torch.empty(stop - start, *shape[1:])
        height = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
        for low in range(start, stop, height):
            high = min(low + height, stop)
            result[low - start : high - start] = self._sum(name, (low, high))
        return result

    def _sum(self, name: str, rows: Range) -> torch.Tensor:
        total = torch.zeros(rows[1] - rows[0], *self.shape(name)[1:], dtype=torch.float64)
        for parent, weight in self._terms:
            values = parent.tensors.read(name, rows)
            if not self._allow_nonfinite and (index := first_nonfinite(values)) is not None:
                row = rows[0] + index // max(1, values[0].numel())
                raise UserError(
                    f"{parent.directory}: {name} is not finite ({values.reshape(-1)[index].item()} in row {row}), and "
                    "so the average would be. Leave this checkpoint out, or write --allow-nonfinite"
                )
            total.add_(values, alpha=weight)
        return total


def _require_several(directories: Sequence[Path]) -> None:
    if len(directories) < 2:
        raise UserError("an average needs two checkpoints or more, and the directory to write: merge A B OUT")
    for number, directory in enumerate(directories):
        for other in directories[:number]:
            if overlap(directory, other) == "is":
                raise UserError(f"{directory} is given twice; give it a larger weight instead")


def _open(directory: Path) -> _Parent:
    if is_hf_directory(directory):
        model, hf_source = open_hf_model(directory, read_once=True)
        said = (read_manifest(directory) or {}).get("source")
        step = said.get("step") if isinstance(said, dict) else None
        return _Parent(directory, "hugging-face", model, hf_source, directory, _as_step(step))
    source = ShardedSource(directory, read_once=True)
    hf_files = directory / HF_SUBDIRECTORY
    view = HFView(source, source.names)
    return _Parent(directory, "sharded", source.model, view, hf_files, _as_step(source.meta.get("step")))


def _as_step(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _step(parent: _Parent, rule: str) -> int:
    if parent.step is None:
        raise UserError(
            f"{parent.directory} does not tell its step, and --weights {rule} goes by the steps: give the checkpoints "
            "of a run, or their exports with manifest.json, or write the weights"
        )
    return parent.step


def _require_different(parents: Sequence[_Parent], steps: Sequence[int]) -> None:
    for number, step in enumerate(steps):
        if step in steps[:number]:
            twin = parents[steps.index(step)].directory
            raise UserError(
                f"{twin} and {parents[number].directory} are both of step {step} and have no order; write the weights"
            )


def _require_alike(first: _Parent, other: _Parent) -> None:
    """Both must mean the same by their numbers.

    Raises:
        UserError: configuration or tokenizer differ.
    """
    a, b = (parent.model.model_dump(mode="json", exclude={"dtype"}) for parent in (first, other))
    if different := [f"{key} {a[key]!r} against {b[key]!r}" for key in a if a[key] != b[key]]:
        raise UserError(
            f"{first.directory} and {other.directory} have different configurations: {'; '.join(different)}. Only "
            "checkpoints of one architecture can be averaged"
        )
    if found := compare_tokenizers(first.hf_files, other.hf_files):
        what, message = found[0]
        raise UserError(
            f"{first.directory} and {other.directory} have different tokenizers ({what}: {message}). Their rows of the "
            "embedding stand for different tokens"
        )


def _common_dtype(parents: Sequence[_Parent], name: str) -> torch.dtype:
    found = {parent.tensors.dtype(name): parent.directory for parent in parents}
    if len(found) > 1:
        kinds = ", ".join(f"{dtype_name(dtype)} in {directory}" for dtype, directory in found.items())
        raise UserError(f"{name} is {kinds}: choose the dtype of the average with --dtype")
    return next(iter(found))


def _checked(parents: Sequence[_Parent], weights: MergeWeights) -> list[dict[str, Any]]:
    """What the manifest says of the parents.

    Raises:
        UserError: the files of one are not as its own manifest says.
    """
    for parent in parents:
        if parent.format == "sharded" or (parent.directory / MANIFEST_NAME).is_file():
            require_intact(parent.directory)
    pairs = zip(parents, weights.values, strict=True)
    return [{**_describe(parent), "weight": weight} for parent, weight in pairs]


def _describe(parent: _Parent) -> dict[str, Any]:
    """With the hash of the parent's manifest, which has those of its files; of every file where there is none."""
    described: dict[str, Any] = {"path": str(parent.directory), "format": parent.format}
    if parent.step is not None:
        described["step"] = parent.step
    manifest = parent.directory / MANIFEST_NAME
    if manifest.is_file():
        return {**described, "manifest_sha256": sha256_file(manifest)}
    files = sorted(path for path in parent.directory.iterdir() if path.is_file())
    return {**described, "files": {path.name: sha256_file(path) for path in files}}
