"""What is in a directory of low-rank adapters, without the model they belong to."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.adapters import is_adapter_checkpoint, open_adapter
from meditron_train.checkpoint.manifest import describe_file, read_manifest, verify_manifest
from meditron_train.errors import MeditronError


def inspect_adapter(directory: Path, *, hashes: bool) -> dict[str, Any]:
    """As `inspect_directory` describes a model; instead of the model, `base` (directory and hash) and `scale`.

    Raises:
        UserError: it cannot be read as an adapter.
    """
    adapter = open_adapter(directory)
    sharded = is_adapter_checkpoint(directory)
    names = [name for factors in adapter.factors.values() for name in factors]
    problems = []
    if sharded or read_manifest(directory) is not None:
        problems += [f"manifest: {problem}" for problem in verify_manifest(directory, check_hashes=hashes)]
    if hashes:
        problems += [problem for name in names if (problem := _tensor_problem(adapter.tensors, name))]
    tensors = [
        {
            "name": name,
            "shape": list(adapter.tensors.shape(name)),
            "dtype": str(adapter.tensors.dtype(name)).removeprefix("torch."),
            "num_bytes": math.prod(adapter.tensors.shape(name)) * adapter.tensors.dtype(name).itemsize,
            "files": adapter.tensors.place(name) if sharded else ["adapter_model.safetensors"],  # type: ignore[attr-defined]
        }
        for name in names
    ]
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        "directory": str(directory),
        "format": "adapter, sharded" if sharded else "adapter, PEFT",
        "intact": not problems,
        "problems": problems,
        "base": {"directory": adapter.base, "weights_sha256": adapter.base_sha256},
        "scale": adapter.scale,
        "num_parameters": sum(math.prod(adapter.tensors.shape(name)) for name in names),
        "num_tensors": len(tensors),
        "num_bytes": sum(tensor["num_bytes"] for tensor in tensors),
        "dtypes": dict(Counter(tensor["dtype"] for tensor in tensors)),
        "tensors": tensors,
        "files": [
            {"name": path.relative_to(directory).as_posix(), "num_bytes": path.stat().st_size}
            | ({"sha256": describe_file(path)["sha256"]} if hashes else {})
            for path in files
        ],
    }


def _tensor_problem(tensors: Any, name: str) -> str | None:
    try:
        finite = bool(torch.isfinite(tensors.read(name)).all())
    except MeditronError as error:
        return f"{name}: {error}"
    return None if finite else f"{name} is not finite"
