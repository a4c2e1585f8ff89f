"""What is in a model directory of either format, without loading it; for a broken one, what exactly is wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.hf_map import check_source
from meditron_train.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from meditron_train.checkpoint.tokenizer_files import check_tokenizer
from meditron_train.convert.side import HFSide, MegatronSide, open_side
from meditron_train.errors import UserError

_BLOCK_BYTES = 1 << 22


def inspect_directory(directory: str | Path, *, hashes: bool = True) -> dict[str, Any]:
    """A JSON-ready description of a Hugging Face directory or a sharded checkpoint.

    Keys: directory, format ("hugging-face" or "sharded"), intact, problems (one line each), model (ModelConfig),
    num_parameters, num_bytes, dtypes (dtype -> number of tensors), tensors (name, shape, dtype, files), files (name,
    num_bytes, sha256), and for a sharded checkpoint step, tokens, samples, layout, contains, padded_vocab_size,
    versions. `hashes=False` skips reading the files. Raises UserError when the directory is not a model at all.
    """
    directory = Path(directory)
    side = open_side(directory)
    description: dict[str, Any] = {"directory": str(directory), "format": side.format}
    if isinstance(side, MegatronSide):
        problems, tensors, facts = _sharded(side)
        problems += _manifest_problems(directory, hashes)
    else:
        problems, tensors, facts = _hugging_face(side)
    try:
        check_tokenizer(side.hf_files, side.model.vocab_size)
    except UserError as error:
        problems.append(str(error))
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
        "files": _files(directory, hashes),
    }


def _sharded(side: MegatronSide) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    source = side.source
    tensors = [
        _tensor(
            name, source.shape(name), str(source.dtype(name)), source.dtype(name).itemsize, source.place(name)
        )
        for name in source.all_names
    ]
    keys = ("step", "tokens", "samples", "layout", "contains", "padded_vocab_size", "versions")
    return source.problems(), tensors, {key: source.meta.get(key) for key in keys}


def _hugging_face(side: HFSide) -> tuple[list[str], list[dict[str, Any]], dict[str, Any]]:
    source = side.source
    problems = []
    try:
        check_source(source, side.model, str(side.directory))
    except UserError as error:
        problems.append(str(error))
    tensors = [
        _tensor(
            name, source.shape(name), str(source.dtype(name)), source.dtype(name).itemsize, source.place(name)
        )
        for name in source.names
    ]
    return problems, tensors, {}


def _tensor(name: str, shape: tuple[int, ...], dtype: str, itemsize: int, files: list[str]) -> dict[str, Any]:
    num_bytes = math.prod(shape) * itemsize
    dtype = dtype.removeprefix("torch.")
    return {"name": name, "shape": list(shape), "dtype": dtype, "num_bytes": num_bytes, "files": files}


def _manifest_problems(directory: Path, hashes: bool) -> list[str]:
    return [f"manifest: {problem}" for problem in verify_manifest(directory, check_hashes=hashes)]


def _files(directory: Path, hashes: bool) -> list[dict[str, Any]]:
    recorded = {}
    if (directory / MANIFEST_NAME).is_file():
        try:
            entries = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
            recorded = {name: str(entry["sha256"]) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            recorded = {}  # _manifest_problems says so
    files = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        entry: dict[str, Any] = {"name": name, "num_bytes": path.stat().st_size}
        if name in recorded:
            entry["sha256"] = recorded[
                name
            ]  # as published; a file that differs from it is among the problems
        elif hashes:
            entry["sha256"] = _sha256(path)
        files.append(entry)
    return files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
