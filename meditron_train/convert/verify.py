"""Compare two models on disk, in either format, exactly: every tensor bit for bit, config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from meditron_train.checkpoint.hf_config import read_hf_config
from meditron_train.checkpoint.hf_map import hf_shapes
from meditron_train.checkpoint.hf_read import is_hf_directory
from meditron_train.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from meditron_train.checkpoint.tokenizer_compare import compare_tokenizers
from meditron_train.convert.side import HFSide, Side, open_side
from meditron_train.errors import UserError

_BLOCK_ELEMENTS = 1 << 22  # differences are measured in float64, block by block
_BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """One thing that differs between A and B."""

    kind: Literal["tensor", "config", "tokenizer", "generation", "file", "logits"]
    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.message}"


@dataclass(frozen=True)
class Comparison:
    """The result of `verify`: equal if and only if `differences` is empty."""

    differences: tuple[Difference, ...]
    num_tensors: int
    num_bytes: int
    max_logit_difference: float | None = None
    kl_divergence: float | None = None


def verify(
    a: str | Path, b: str | Path, *, logits: bool = False, progress: Callable[[str, int], None] | None = None
) -> Comparison:
    """Compare the models in directories `a` and `b`, each a Hugging Face directory or a sharded checkpoint.

    Tensors are compared under their Hugging Face names, one at a time, by bits: two NaNs are equal when their bits
    are, and 0.0 differs from -0.0. The files of a side that has a manifest must be as it says. With `logits`,
    transformers also runs both in fp32 on CPU. Raises UserError when a side is not a model at all; damage inside a
    side is a difference.
    """
    contradictions = _contradictory_configs(a, b)
    if contradictions:
        return Comparison(tuple(contradictions), 0, 0)
    side_a, side_b = open_side(a), open_side(b)
    differences = _compare_configs(side_a, side_b)
    names = _names(side_a, side_b)
    num_bytes = 0
    for name in names:
        message, tensor_bytes = _compare_tensor(side_a, side_b, name)
        num_bytes += tensor_bytes
        if message:
            differences.append(Difference("tensor", name, message))
        if progress is not None:
            progress(name, tensor_bytes)
    for file, message in compare_tokenizers(side_a.hf_files, side_b.hf_files):
        differences.append(Difference("tokenizer", file, message))
    differences += _compare_generation(side_a, side_b)
    differences += [*_changed_files("A", side_a), *_changed_files("B", side_b)]
    max_logit, divergence = None, None
    if logits:
        from meditron_train.convert.logits import compare_logits

        try:
            max_logit, divergence = compare_logits(side_a, side_b)
        except UserError as error:  # a damaged side: what was found above must still be told
            differences.append(Difference("logits", "transformers fp32", f"cannot be computed: {error}"))
        if max_logit is not None and not max_logit <= 1e-5:  # also when it is NaN
            differences.append(
                Difference("logits", "transformers fp32", f"max |Δ| {max_logit:.3e}, KL {divergence:.3e}")
            )
    return Comparison(tuple(differences), len(names), num_bytes, max_logit, divergence)


def compare_bits(a: torch.Tensor, b: torch.Tensor) -> str:
    """Empty when two tensors of one shape and dtype have the same bits; else where they first differ, by how much."""
    bits_a, bits_b = (t.contiguous().reshape(-1).view(_BIT_TYPES[t.element_size()]) for t in (a, b))
    if torch.equal(bits_a, bits_b):
        return ""
    num_different, first, largest = 0, -1, 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, bits_a.numel(), _BLOCK_ELEMENTS):
        block = slice(start, start + _BLOCK_ELEMENTS)
        different = bits_a[block] != bits_b[block]
        count = int(different.sum())
        if not count:
            continue
        num_different += count
        if first < 0:
            first = start + int(different.to(torch.uint8).argmax())
        delta = (flat_a[block][different].double() - flat_b[block][different].double()).abs().max().item()
        largest = max(largest, delta) if delta == delta and largest == largest else float("nan")
    where = [int(i) for i in torch.unravel_index(torch.tensor(first), a.shape)] if a.dim() else []
    return (
        f"{num_different} of {a.numel()} elements differ, first at {where}: "
        f"{flat_a[first].item()!r} against {flat_b[first].item()!r}, max |Δ| {largest:.6g}"
    )


def _names(side_a: Side, side_b: Side) -> list[str]:
    """Every tensor that a side has or should have, in the order of the layers, then what else is stored."""
    expected = [*hf_shapes(side_a.model), *hf_shapes(side_b.model)]
    return list(dict.fromkeys([*expected, *side_a.names, *side_b.names]))


def _compare_tensor(side_a: Side, side_b: Side, name: str) -> tuple[str, int]:
    """(what differs or "", bytes of the tensor on side A)"""
    missing = [label for label, side in (("A", side_a), ("B", side_b)) if name not in side.names]
    if missing and name == "lm_head.weight" and side_a.model.tie_embeddings and side_b.model.tie_embeddings:
        return (
            f"tied to the embedding, and left out in {missing[0]}, but stored with other values on the other side",
            0,
        )
    if missing:
        return f"missing in {' and '.join(missing)}", 0
    for label, side in (("A", side_a), ("B", side_b)):
        try:
            side.shape(name)
        except UserError as error:
            return f"{label}: {error}", 0
    shape_a, shape_b = side_a.shape(name), side_b.shape(name)
    if shape_a != shape_b:
        return f"shape {list(shape_a)} against {list(shape_b)}", 0
    try:
        label, tensor_a = "A", side_a.read(name)
        label, tensor_b = "B", side_b.read(name)
    except UserError as error:
        return f"{label}: {error}", 0
    num_bytes = tensor_a.numel() * tensor_a.element_size()
    if tensor_a.dtype == tensor_b.dtype:
        return compare_bits(tensor_a, tensor_b), num_bytes
    # Values are compared in the narrower type, to tell a plain cast from other weights.
    narrow = min(tensor_a.dtype, tensor_b.dtype, key=lambda dtype: dtype.itemsize)
    after_cast = compare_bits(tensor_a.to(narrow), tensor_b.to(narrow)) or "equal"
    return (
        f"dtype {tensor_a.dtype} against {tensor_b.dtype}; after a cast to {narrow}: {after_cast}",
        num_bytes,
    )


def _contradictory_configs(a: str | Path, b: str | Path) -> list[Difference]:
    """A Hugging Face config.json that is there but describes no model we can compare is what differs."""
    found = []
    for label, directory in (("A", Path(a)), ("B", Path(b))):
        if is_hf_directory(directory):
            try:
                read_hf_config(directory)
            except UserError as error:
                found.append(Difference("config", f"config.json of {label}", str(error)))
    return found


def _compare_configs(side_a: Side, side_b: Side) -> list[Difference]:
    """Field by field. The dtype that a config states is left out: the tensors' own are compared."""
    fields_a, fields_b = (
        _flatten(side.model.model_dump(mode="json", exclude={"dtype"})) for side in (side_a, side_b)
    )
    return [
        Difference("config", key, f"{fields_a[key]!r} against {fields_b[key]!r}")
        for key in fields_a
        if fields_a[key] != fields_b[key]
    ]


def _changed_files(label: str, side: Side) -> list[Difference]:
    """Files of a side that are not as its manifest says. It sees what no tensor shows: padding rows, file framing."""
    if isinstance(side, HFSide) and not (side.directory / MANIFEST_NAME).is_file():
        return []  # a Hugging Face directory need not have one
    return [Difference("file", f"of {label}", problem) for problem in verify_manifest(side.directory)]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _compare_generation(side_a: Side, side_b: Side) -> list[Difference]:
    """Keys of generation_config.json, when both sides have one."""
    paths = [side.hf_files / "generation_config.json" for side in (side_a, side_b)]
    if not all(path.is_file() for path in paths):
        return []
    try:
        a, b = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    except ValueError as error:
        return [Difference("generation", "generation_config.json", f"not valid JSON: {error}")]
    keys = sorted((a.keys() | b.keys()) - {"transformers_version", "_from_model_config"})
    return [
        Difference("generation", key, f"{a.get(key)!r} against {b.get(key)!r}")
        for key in keys
        if a.get(key) != b.get(key)
    ]
