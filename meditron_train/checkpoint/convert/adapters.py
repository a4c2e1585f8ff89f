"""Adapters out of a run's checkpoint for PEFT, and into their base model; both published by one rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.adapters import (
    BASE_HASH_KEY,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterWeights,
    is_adapter_checkpoint,
    open_adapter,
    peft_config,
    peft_names,
)
from meditron_train.checkpoint.base_weights import BaseWeights, open_base, weights_sha256
from meditron_train.checkpoint.convert.engine import (
    NO_LIMITS,
    Limits,
    Progress,
    convert_files,
    describe_conversion,
    describe_hf_files,
)
from meditron_train.checkpoint.convert.source_files import SourceFiles, files_identity
from meditron_train.checkpoint.convert.to_hf import write_hf_tensors
from meditron_train.checkpoint.convert.workspace import Alone, Ranks, require_absent
from meditron_train.checkpoint.dtypes import dtype_name, parse_dtype, require_convertible
from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.directory import copy_generation_config
from meditron_train.checkpoint.hf.plan import (
    plan_safetensors_file,
)
from meditron_train.checkpoint.manifest import MANIFEST_NAME, TensorEntry, read_manifest, require_intact
from meditron_train.checkpoint.planned import PlannedTensor
from meditron_train.checkpoint.sharded.read import read_meta
from meditron_train.checkpoint.tensor_map import Piece, hf_shapes
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer, copy_tokenizer
from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import sha256_file
from meditron_train.log import get_logger
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.units import parse_num_bytes

_log = get_logger(__name__)


def export_adapter(checkpoint: Path, directory: Path, *, limits: Limits = NO_LIMITS) -> None:
    """Write the adapters of a run's checkpoint as a directory that PEFT loads, with its tokenizer and manifest.json.

    Raises:
        UserError: the output exists and is not empty, or the checkpoint is not what its manifest says.
    """
    inputs = SourceFiles(checkpoint)
    require_intact(checkpoint)
    require_absent(directory, checkpoint)
    adapter, meta = open_adapter(checkpoint), read_meta(checkpoint)
    lora, model = LoraSection.model_validate(meta["lora"]), ModelConfig.model_validate(meta["model"])
    tensors = [
        PlannedTensor(name, adapter.tensors.dtype(stored), shape, (Piece(stored, 0, shape[0], name),))
        for matrix, factors in adapter.factors.items()
        for name, stored in zip(peft_names(matrix), factors, strict=True)
        for shape in [adapter.tensors.shape(stored)]
    ]
    said = {BASE_HASH_KEY: adapter.base_sha256} if adapter.base_sha256 else {}

    def complete(written: Path) -> dict[str, Any]:
        config = json.dumps(peft_config(lora, adapter.base), indent=2) + "\n"
        (written / CONFIG_NAME).write_text(config, encoding="utf-8")
        copy_generation_config(adapter.hf_files, written)
        copy_tokenizer(adapter.hf_files, written)
        return {**describe_hf_files(written), "base": meta["base"], "lora": meta["lora"]}

    origin = {"step": meta.get("step"), "manifest_sha256": sha256_file(checkpoint / MANIFEST_NAME)}
    convert_files(
        directory,
        [plan_safetensors_file(WEIGHTS_NAME, tensors, said)],
        adapter.tensors,
        inputs,
        identity={"to": "peft", "source": files_identity(checkpoint)},
        complete=complete,
        manifest=describe_conversion(checkpoint, model, None, format="sharded", **origin),
        entries={tensor.name: TensorEntry(dtype_name(tensor.dtype), tensor.shape) for tensor in tensors},
        limits=limits,
    )


def merge_adapter(
    base_directory: Path,
    adapter_directory: Path,
    hf_directory: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write W + scale·B·A for every adapted matrix, and all other tensors as they are, as a Hugging Face directory.

    The sum is computed in float64, rounded to fp32 and then to the dtype of the base, or `dtype`. Memory: blocks of a
    few MiB. Tokenizer and generation settings are the adapter's, where it has them.

    Raises:
        UserError: the adapter is for another base, the output exists and is not empty, or weights are not finite.
    """
    target, max_num_bytes = parse_dtype(dtype), parse_num_bytes(max_shard_size)
    inputs = SourceFiles(base_directory, adapter_directory)
    base, adapter = open_base(base_directory), open_adapter(adapter_directory)
    adapter.require_fit(base.model)
    require_absent(hf_directory, base_directory, adapter_directory)
    hf_files = adapter.hf_files if has_tokenizer(adapter.hf_files) else base.hf_files
    check_tokenizer(hf_files, base.model.vocab_size)
    (ranks or Alone()).on_first(lambda: _require_base(base, adapter))
    for name in hf_shapes(base.model):
        require_convertible(name, base.tensors.dtype(name), target)
    tensors = [
        PlannedTensor(name, target or base.tensors.dtype(name), shape, (Piece(name, 0, shape[0], name),))
        for name, shape in hf_shapes(base.model).items()
    ]
    merged = {
        "directory": adapter_directory.resolve().name,
        "scale": adapter.scale,
        "matrices": len(adapter.factors),
        "base_weights_sha256": adapter.base_sha256,
        "training": _training_of(adapter_directory),
    }
    write_hf_tensors(
        _Merged(base, adapter),
        tensors,
        base.model,
        inputs,
        hf_directory,
        hf_files,
        max_num_bytes=max_num_bytes,
        identity={
            "to": "merged",
            "dtype": "keep" if target is None else dtype_name(target),
            "source": files_identity(base_directory),
            "adapter": files_identity(adapter_directory),
        },
        manifest=describe_conversion(base_directory, base.model, target, format="merged", adapter=merged),
        generation_from=base.hf_files,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


def _training_of(adapter_directory: Path) -> dict[str, Any] | None:
    """The checkpoint of the run that trained an adapter, its step and the hash of its manifest; None for an adapter of
    another program."""
    directory = adapter_directory.resolve()
    if is_adapter_checkpoint(directory):
        manifest = directory / MANIFEST_NAME
        digest = sha256_file(manifest) if manifest.is_file() else None
        return {
            "checkpoint": str(directory),
            "step": read_meta(directory).get("step"),
            "manifest_sha256": digest,
        }
    source = (read_manifest(directory) or {}).get("source")
    if not isinstance(source, dict) or source.get("format") != "sharded":
        return None
    checkpoint = directory.parent / "checkpoints" / str(source.get("directory"))
    return {
        "checkpoint": str(checkpoint),
        "step": source.get("step"),
        "manifest_sha256": source.get("manifest_sha256"),
    }


def _require_base(base: BaseWeights, adapter: AdapterWeights) -> None:
    """Refuse weights that the adapter was not trained on.

    Raises:
        UserError: their hash is not the one that the adapter names.
    """
    if adapter.base_sha256 is None:
        _log.warning(
            "%s does not say by a hash which weights it belongs to: only names and shapes were compared",
            adapter.directory,
        )
        return
    found = weights_sha256(base)
    if found != adapter.base_sha256:
        trained_on = f"{adapter.base} when it was trained" if adapter.base else "others"
        raise UserError(
            f"{adapter.directory} is an adapter for another base: the weights of {base.directory} have the hash "
            f"{found[:12]}…, but it belongs to {adapter.base_sha256[:12]}… ({trained_on}). Name that model"
        )


class _Merged:
    """The base's tensors, those that are adapted with B·A added, in float64."""

    def __init__(self, base: BaseWeights, adapter: AdapterWeights) -> None:
        self._base, self._adapter = base.tensors, adapter

    def shape(self, name: str) -> Shape:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64 if name in self._adapter.factors else self._base.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        weights = self._base.read(name, rows)
        if name not in self._adapter.factors:
            return weights
        return self._adapter.product(name, rows).add_(weights)
