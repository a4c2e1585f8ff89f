"""Compare two models on disk, in either format, exactly: every tensor bit for bit, config, tokenizer.

Tensors are read in blocks of rows, so that none has to fit in memory. The files of a side that has a manifest are read
once more, for their hashes: these see what no tensor shows. A side may also be a manifest alone, whose hashes then
stand for its tensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from meditron_train.verify.compare_logits import LogitComparison

from meditron_train.checkpoint.dtypes import parse_dtype
from meditron_train.checkpoint.files.stored import row_blocks
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.hf.read import is_hf_directory
from meditron_train.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from meditron_train.checkpoint.megatron.source import MegatronOptions, is_megatron_directory
from meditron_train.checkpoint.tensor_map import hf_shapes
from meditron_train.checkpoint.tokenizer.beside_model import (
    compare_fingerprints,
    compare_tokenizers,
    tokenizer_fingerprint,
)
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import MeditronError, UserError
from meditron_train.tokenizer.files import has_tokenizer, tokenizer_files
from meditron_train.verify.compare_tensors import BitComparison
from meditron_train.verify.scan import in_parallel, scan_tensor
from meditron_train.verify.side import (
    AnySide,
    HFSide,
    ManifestSide,
    MegatronSide,
    open_side,
)


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
    """The result of `verify`: equal if and only if `differences` is empty.

    Attributes:
        cast: the dtype to which tensors were cast before they were compared, because it was declared.
        with_tokenizers: whether both sides have a tokenizer, so that they could be compared.
        logits: set with `--logits`.
    """

    differences: tuple[Difference, ...]
    num_tensors: int
    num_bytes: int
    cast: str | None = None
    with_tokenizers: bool = True
    logits: LogitComparison | None = None


def verify(
    a: str | Path,
    b: str | Path,
    *,
    dtype: str | None = None,
    logits: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare the models `a` and `b`, each a Hugging Face directory, a sharded checkpoint, or a manifest.

    Tensors are compared under their Hugging Face names by bits: two NaNs are equal when their bits are, and
    0.0 differs from -0.0. The files of a side that has a manifest must be as it says. Damage inside a side is
    a difference.

    Args:
        a, b: the models.
        dtype: "bf16", …: declares a cast; tensors of different dtypes are compared after it. A side whose
            manifest says that it was written with a cast declares that one.
        logits: independent programs also run both in fp32 on CPU.
        progress: called with the tensor just compared, its bytes and all bytes.

    Raises:
        UserError: a side is not a model at all.
    """
    declared = parse_dtype(dtype)
    contradictions = _contradictory_configs(a, b)
    if contradictions:
        return Comparison(tuple(contradictions), 0, 0)
    side_a, side_b = _open_sides(a, b)
    if logits and (isinstance(side_a, ManifestSide) or isinstance(side_b, ManifestSide)):
        raise UserError("--logits needs the weights of both sides, and one of them is only a manifest")
    cast = declared or _stated_cast(side_a, side_b)
    differences = _compare_configs(side_a, side_b)
    names = _names(side_a, side_b)
    sizes = {name: _num_bytes(side_a, name) for name in names}
    num_cast, comparable = 0, not differences
    for name, found in in_parallel(lambda name: _compare_tensor(side_a, side_b, name, cast), names):
        num_cast += found.was_cast
        comparable &= found.was_compared
        if found.message:
            differences.append(Difference("tensor", name, found.message))
        if progress is not None:
            progress(name, sizes[name], sum(sizes.values()))
    differences += _compare_tokenizers(side_a, side_b)
    differences += _compare_generation(side_a, side_b)
    differences += [*_changed_files("A", side_a), *_changed_files("B", side_b)]
    compared = None
    if logits and not comparable:
        differences.append(Difference("logits", "fp32", "not computed, see above"))
    elif logits:
        compared, more = _compare_logits(side_a, side_b, cast if num_cast else None)
        differences += more
    with_tokenizers = _has_tokenizer(side_a) and _has_tokenizer(side_b)
    cast_name = str(cast).removeprefix("torch.") if num_cast else None
    return Comparison(
        tuple(differences), len(names), sum(sizes.values()), cast_name, with_tokenizers, compared
    )


def _open_sides(a: str | Path, b: str | Path) -> tuple[AnySide, AnySide]:
    """Another program's checkpoint does not always have a tokenizer, say the size of its vocabulary, or how RoPE was
    scaled: those are B's then, or A's. The rest of its configuration is its own, and compared."""
    if not is_megatron_directory(a):
        side_a = open_side(a)
        return side_a, open_side(b, _completed_by(side_a))
    side_b = open_side(b, MegatronOptions(rope_as_stated=True))
    return open_side(a, _completed_by(side_b)), side_b


def _completed_by(side: AnySide) -> MegatronOptions:
    tokenizer = None if isinstance(side, ManifestSide) or not has_tokenizer(side.hf_files) else side.hf_files
    return MegatronOptions(tokenizer=tokenizer, vocab_size=side.model.vocab_size, other=side.model)


def _has_tokenizer(side: AnySide) -> bool:
    """Whether the side has one of its own."""
    if isinstance(side, ManifestSide):
        return side.tokenizer() is not None
    return side.has_own_tokenizer if isinstance(side, MegatronSide) else has_tokenizer(side.hf_files)


def _stated_cast(side_a: AnySide, side_b: AnySide) -> torch.dtype | None:
    """The cast that a manifest declares; when both do, that of the side which was made from the other."""
    stated = {
        a.cast for a, b in ((side_a, side_b), (side_b, side_a)) if b.cast is None or _is_made_from(a, b)
    }
    stated.discard(None)
    found = getattr(torch, str(stated.pop()), None) if len(stated) == 1 else None
    return found if isinstance(found, torch.dtype) else None


def _is_made_from(side: AnySide, other: AnySide) -> bool:
    return side.made_from is not None and side.made_from == other.directory.resolve().name


def _names(side_a: AnySide, side_b: AnySide) -> list[str]:
    """Every tensor that a side has or should have, in the order of the layers, then what else is stored."""
    expected = [*hf_shapes(side_a.model), *hf_shapes(side_b.model)]
    return list(dict.fromkeys([*expected, *side_a.names, *side_b.names]))


def _num_bytes(side: AnySide, name: str) -> int:
    """Of a tensor on side A; 0 where it is missing or damaged."""
    try:
        return side.dtype(name).itemsize * math.prod(side.shape(name)) if name in side.names else 0
    except UserError:
        return 0


@dataclass(frozen=True)
class _TensorResult:
    """What the comparison of one tensor found.

    Attributes:
        was_compared: both sides have the tensor, in the same shape.
    """

    message: str = ""
    was_cast: bool = False
    was_compared: bool = True


def _compare_tensor(side_a: AnySide, side_b: AnySide, name: str, cast: torch.dtype | None) -> _TensorResult:
    if message := _without_reading(side_a, side_b, name):
        return _TensorResult(message, was_compared=False)
    dtype_a, dtype_b = side_a.dtype(name), side_b.dtype(name)
    if dtype_a == dtype_b:
        return _TensorResult(_compare_values(side_a, side_b, name, dtype_a))
    if cast in (dtype_a, dtype_b):
        return _TensorResult(_compare_values(side_a, side_b, name, cast), was_cast=True)
    # Values are compared in the narrower type, to tell a plain cast from other weights.
    narrow = min(dtype_a, dtype_b, key=lambda dtype: dtype.itemsize)
    after_cast = _compare_values(side_a, side_b, name, narrow) or "equal"
    return _TensorResult(f"dtype {dtype_a} against {dtype_b}; after a cast to {narrow}: {after_cast}")


def _without_reading(side_a: AnySide, side_b: AnySide, name: str) -> str:
    """What differs by presence and shape, or nothing."""
    missing = [label for label, side in (("A", side_a), ("B", side_b)) if name not in side.names]
    if missing and name == "lm_head.weight" and side_a.model.tie_embeddings and side_b.model.tie_embeddings:
        return f"tied to the embedding, and left out in {missing[0]}, but stored with other values on the other side"
    if missing:
        return f"missing in {' and '.join(missing)}"
    for label, side in (("A", side_a), ("B", side_b)):
        try:
            side.shape(name)
        except UserError as error:
            return f"{label}: {error}"
    shape_a, shape_b = side_a.shape(name), side_b.shape(name)
    return f"shape {list(shape_a)} against {list(shape_b)}" if shape_a != shape_b else ""


def _compare_values(side_a: AnySide, side_b: AnySide, name: str, dtype: torch.dtype) -> str:
    if isinstance(side_a, ManifestSide) or isinstance(side_b, ManifestSide):
        return _compare_hashes(side_a, side_b, name, dtype)
    comparison = BitComparison(side_a.shape(name))
    label = "A"
    try:
        for rows in row_blocks(
            side_a.shape(name), max(side_a.dtype(name), side_b.dtype(name), key=_itemsize)
        ):
            label = "A"
            block_a = side_a.read(name, rows).to(dtype)
            label = "B"
            block_b = side_b.read(name, rows).to(dtype)
            comparison.add(block_a, block_b, rows[0] if rows else 0)
    except MeditronError as error:
        return f"{label}: {error}"
    return str(comparison)


def _itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _compare_hashes(side_a: AnySide, side_b: AnySide, name: str, dtype: torch.dtype) -> str:
    hashes = []
    for label, side in (("A", side_a), ("B", side_b)):
        if not isinstance(side, ManifestSide):
            scanned = scan_tensor(side, name, dtype)
            if scanned.problem:
                return f"{label}: {scanned.problem}"
            hashes.append(scanned.sha256)
        elif side.dtype(name) == dtype:
            hashes.append(side.sha256(name))
        else:
            return (
                f"{label} has a hash for {side.dtype(name)} only, which says nothing after a cast to {dtype}"
            )
    return "" if hashes[0] == hashes[1] else f"SHA-256 {hashes[0][:16]}… against {hashes[1][:16]}…"


def _compare_tokenizers(side_a: AnySide, side_b: AnySide) -> list[Difference]:
    try:
        with _as_of_the_model(side_a, side_b) as a, _as_of_the_model(side_b, side_a) as b:
            if isinstance(a, Path) and isinstance(b, Path):
                found = compare_tokenizers(a, b)
            else:
                found = compare_fingerprints(
                    *(tokenizer_fingerprint(x) if isinstance(x, Path) else x for x in (a, b))
                )
    except UserError as error:
        found = [("tokenizer", str(error))]
    return [Difference("tokenizer", what, message) for what, message in found]


@contextmanager
def _as_of_the_model(side: AnySide, other: AnySide) -> Iterator[Path | dict[str, Any] | None]:
    """Where the side's tokenizer lies, or its fingerprint. Another program's has no config.json beside it, by which
    transformers decides how to read one: it is read as that of the model that it is compared with."""
    if isinstance(side, ManifestSide):
        yield side.tokenizer()
        return
    if not isinstance(side, MegatronSide) or not side.has_own_tokenizer or isinstance(other, MegatronSide):
        yield side.hf_files
        return
    with TemporaryDirectory() as scratch:
        for name, path in tokenizer_files(side.hf_files).items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(scratch) / name)
        if isinstance(other, ManifestSide):
            (Path(scratch) / "config.json").write_text(json.dumps({"model_type": other.model.family}))
        elif (other.hf_files / "config.json").is_file():
            shutil.copyfile(other.hf_files / "config.json", Path(scratch) / "config.json")
        yield Path(scratch)


def _compare_logits(
    side_a: AnySide, side_b: AnySide, cast: torch.dtype | None
) -> tuple[LogitComparison | None, list[Difference]]:
    from meditron_train.verify.compare_logits import compare_logits  # imports the model and transformers

    assert not isinstance(side_a, ManifestSide) and not isinstance(side_b, ManifestSide)
    try:
        compared = compare_logits(side_a, side_b, cast)
    except MeditronError as error:  # a damaged side: what was found above must still be reported
        return None, [Difference("logits", "fp32", f"cannot be computed: {error}")]
    return compared, [Difference("logits", what, message) for what, message in compared.problems()]


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


def _compare_configs(side_a: AnySide, side_b: AnySide) -> list[Difference]:
    """Field by field. The dtype that a config states is left out: the tensors' own are compared."""
    fields_a, fields_b = (
        _flatten(_as_computed(side.model).model_dump(mode="json", exclude={"dtype"}))
        for side in (side_a, side_b)
    )
    return [
        Difference("config", key, f"{fields_a[key]!r} against {fields_b[key]!r}")
        for key in fields_a
        if fields_a[key] != fields_b[key]
    ]


def _as_computed(model: ModelConfig) -> ModelConfig:
    """A Mistral without a window is a Llama, and in Megatron's arguments nothing tells them apart."""
    is_llama = model.family == "mistral" and model.sliding_window is None
    return model.model_copy(update={"family": "llama"}) if is_llama else model


def _changed_files(label: str, side: AnySide) -> list[Difference]:
    """Files of a side that are not as its manifest says. It sees what no tensor shows: padding rows, file framing."""
    if isinstance(side, ManifestSide):
        return []
    if isinstance(side, HFSide | MegatronSide) and not os.path.lexists(side.directory / MANIFEST_NAME):
        return []  # only a sharded checkpoint must have one
    return [Difference("file", f"of {label}", problem) for problem in verify_manifest(side.directory)]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _compare_generation(side_a: AnySide, side_b: AnySide) -> list[Difference]:
    """Keys of generation_config.json, when both sides have one."""
    try:
        a, b = side_a.generation(), side_b.generation()
    except UserError as error:
        return [Difference("generation", "generation_config.json", str(error))]
    if a is None or b is None:
        return []
    keys = sorted((a.keys() | b.keys()) - {"transformers_version", "_from_model_config"})
    return [
        Difference("generation", key, f"{a.get(key)!r} against {b.get(key)!r}")
        for key in keys
        if a.get(key) != b.get(key)
    ]
