"""What is in a model directory of either format, without loading it; for a broken one, what exactly is wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.adapters import is_adapter_directory
from meditron_train.checkpoint.convert.engine import Progress
from meditron_train.checkpoint.hf.directory import read_generation_config
from meditron_train.checkpoint.hf.read import HFSource
from meditron_train.checkpoint.manifest import MANIFEST_NAME, describe_file, read_manifest, verify_manifest
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import check_source
from meditron_train.checkpoint.tied_head import HEAD, differing_head
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer
from meditron_train.errors import UserError
from meditron_train.verify.adapter import inspect_adapter
from meditron_train.verify.scan import in_parallel, scan_tensor
from meditron_train.verify.side import FullSide, HFSide, MegatronSide, ShardedSide, open_full_side


def inspect_directory(
    directory: str | Path, *, hashes: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """A JSON-ready description of a Hugging Face directory or a sharded checkpoint.

    Args:
        directory: the model.
        hashes: read the files and tensors in blocks, hash them and look for NaN and infinity.
        progress: see `Progress`.

    Returns:
        Keys: directory, format ("hugging-face", "sharded" or "megatron"), intact, problems (one line each),
        model (ModelConfig), num_parameters, num_bytes, dtypes (dtype -> number of tensors), tensors (name,
        shape, dtype, files), files (name, num_bytes, sha256). For a sharded checkpoint also step, tokens,
        samples, layout, contains, padded_vocab_size and versions; for another program's step, layout and
        padded_vocab_size, as far as known.

    Raises:
        UserError: the directory is not a model at all.
    """
    directory = Path(directory)
    if is_adapter_directory(directory):
        return inspect_adapter(directory, hashes=hashes)
    side = open_full_side(directory, MegatronOptions(padded_vocabulary=True, rope_as_stated=True))
    description: dict[str, Any] = {"directory": str(directory), "format": side.format}
    if isinstance(side, ShardedSide):
        problems, tensors, facts = _sharded(side)
    elif isinstance(side, MegatronSide):
        problems, tensors, facts = _megatron(side)
    else:
        problems, tensors, facts = _hugging_face(side)
    manifest = read_manifest(directory)
    if manifest is not None or isinstance(side, ShardedSide):
        problems += [f"manifest: {problem}" for problem in verify_manifest(directory, check_hashes=hashes)]
    if hashes:
        problems += _tensor_problems(side, manifest or {}, progress)
    problems += _beside_the_weights(side)
    return {
        **description,
        "intact": not problems,
        "problems": problems,
        **facts,
        "model": side.model.model_dump(mode="json"),
        "num_parameters": side.model.num_parameters,
        "num_tensors": len(tensors),
        "num_bytes": sum(tensor["num_bytes"] for tensor in tensors),
        "dtypes": dict(Counter(tensor["dtype"] for tensor in tensors)),
        "tensors": tensors,
        "files": _files(directory, hashes, manifest or {}),
    }


def _beside_the_weights(side: FullSide) -> list[str]:
    """What is wrong with the tokenizer and the generation settings."""
    problems = []
    try:
        check_tokenizer(side.hf_files, side.model.vocab_size)
    except UserError as error:
        problems.append(str(error))
    try:
        read_generation_config(side.hf_files)
    except UserError as error:
        problems.append(str(error))
    return problems


def _sharded(side: ShardedSide) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    source = side.source
    tensors = _tensors(source, source.all_names)
    keys = ("step", "tokens", "samples", "layout", "contains", "padded_vocab_size", "versions")
    return source.problems() + source.pickle_problems(), tensors, {key: source.meta.get(key) for key in keys}


def _megatron(side: MegatronSide) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    source = side.source
    tensors = _tensors(source, source.names)
    facts = {"step": source.iteration, "layout": source.layout, "padded_vocab_size": source.padded_vocab_size}
    return [], tensors, facts  # what is wrong with one is an error when it is opened


def _hugging_face(side: HFSide) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    source = side.source
    problems = []
    try:
        check_source(source, side.model, str(side.directory))
    except UserError as error:
        problems.append(str(error))
    if side.model.tie_embeddings and HEAD in side.names:
        problems.append(differing_head(str(side.directory)))
    tensors = _tensors(source, source.names)
    return problems, tensors, {}


def _tensors(source: HFSource | ShardedSource | MegatronSource, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(source.shape(name)),
            "dtype": str(source.dtype(name)).removeprefix("torch."),
            "num_bytes": math.prod(source.shape(name)) * source.dtype(name).itemsize,
            "files": source.place(name),
        }
        for name in names
    ]


def _tensor_problems(side: FullSide, manifest: dict[str, Any], progress: Progress | None) -> list[str]:
    """Tensors that cannot be read, hold NaN or infinity, or differ from the manifest: each is read once, apart from
    the hashes of whole files."""
    problems = []
    recorded = manifest.get("tensors") or {}
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        problems.append(f"manifest: {MANIFEST_NAME} is damaged: its tensors are not objects")
        recorded = {}
    sizes = {name: _num_bytes_of(side, name) for name in side.names}
    for name, found in in_parallel(lambda name: scan_tensor(side, name), side.names):
        if found.problem:
            problems.append(f"{name}: {found.problem}")
        elif name in recorded and found.sha256 != recorded[name].get("sha256"):
            problems.append(f"{name} has changed: its SHA-256 is not that of the manifest")
        if found.nonfinite:
            problems.append(f"{name} is not finite: {found.nonfinite}")
        if progress is not None:
            progress(name, sizes[name], sum(sizes.values()))
    return problems


def _num_bytes_of(side: FullSide, name: str) -> int:
    try:
        return math.prod(side.shape(name)) * side.dtype(name).itemsize
    except UserError:
        return 0  # scan_tensor says why


def _files(directory: Path, hashes: bool, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    files = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        entry: dict[str, Any] = {"name": name, "num_bytes": path.stat().st_size}
        recorded = (manifest.get("files") or {}).get(name)
        if isinstance(recorded, dict) and "sha256" in recorded:
            entry["sha256"] = str(recorded["sha256"])  # a file that differs from it is among the problems
        elif hashes:
            entry["sha256"] = describe_file(path)["sha256"]
        files.append(entry)
    return files
