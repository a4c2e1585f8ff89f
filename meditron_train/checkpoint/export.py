"""From a sharded checkpoint to a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from meditron_train.checkpoint.conversion import NO_LIMITS, Limits, Progress, convert_files, files_identity
from meditron_train.checkpoint.hf_config import generation_config_of, model_config_to_hf
from meditron_train.checkpoint.hf_map import hf_pieces, tensor_specs
from meditron_train.checkpoint.hf_write import (
    INDEX_NAME,
    parse_num_bytes,
    plan_safetensors,
    safetensors_index,
)
from meditron_train.checkpoint.manifest import TensorEntry, read_tensor_hashes, require_intact
from meditron_train.checkpoint.megatron_read import MegatronSource
from meditron_train.checkpoint.stream import PlannedTensor, RowSource
from meditron_train.checkpoint.tokenizer_compare import tokenizer_fingerprint
from meditron_train.checkpoint.tokenizer_files import check_tokenizer, copy_tokenizer, read_json_object
from meditron_train.checkpoint.workspace import Alone, Ranks, require_absent
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HF_SUBDIRECTORY = "hf"


def export_hf(
    checkpoint: str | Path,
    hf_directory: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model of a finished sharded checkpoint as a Hugging Face directory with manifest.json.

    dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own. max_shard_size: "5GB", "500MB", … or bytes.
    Vocabulary padding is removed and a tied `lm_head` left out. Memory: blocks of a few MiB. Every file of the
    checkpoint is checked against its manifest: before anything is written or, where it holds hashes of tensors, on the
    way. An interrupted call is continued by the next one with the same arguments. Raises UserError when the output
    exists and is not empty, the checkpoint is not what its manifest says, or weights are not finite; nothing is left
    behind then.
    """
    checkpoint = Path(checkpoint)
    target = parse_dtype(dtype)
    max_num_bytes = parse_num_bytes(max_shard_size)
    source = MegatronSource(checkpoint, read_once=True)
    specs = tensor_specs(source.model)
    hf_files = checkpoint / HF_SUBDIRECTORY
    check_tokenizer(hf_files, source.model.vocab_size)
    read_generation_config(hf_files)
    require_absent(hf_directory, checkpoint)
    # Files of whose every tensor the manifest has a hash are checked on the way instead of being read twice.
    hashes = read_tensor_hashes(checkpoint)
    streamed = {file for spec in specs for file in source.place(spec.name)}
    for spec in specs:
        if not hashes.keys() >= set(spec.hf_names):
            streamed.difference_update(source.place(spec.name))
    (ranks or Alone()).on_first(lambda: require_intact(checkpoint, unhashed=streamed))
    write_hf_model(
        source,
        hf_directory,
        hf_files,
        target=target,
        max_num_bytes=max_num_bytes,
        origin={"format": "sharded", "step": source.meta.get("step")},
        expected=hashes,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


class ShardedModel(RowSource, Protocol):
    """Tensors under the names and in the order of `hf_map.tensor_specs`, and whose they are."""

    directory: Path
    model: ModelConfig


def write_hf_model(
    source: ShardedModel,
    hf_directory: str | Path,
    hf_files: Path | None,
    *,
    target: torch.dtype | None,
    max_num_bytes: int,
    origin: Mapping[str, Any],
    expected: Mapping[str, str] | None,
    limits: Limits,
    ranks: Ranks | None,
    progress: Progress | None,
) -> None:
    """Write weights, config and tokenizer of `source` as a Hugging Face directory with manifest.json; collective.

    hf_files: where the tokenizer lies. target: dtype of all tensors, None for each its own. origin: what the manifest
    says of the source. expected: hashes that the source's tensors must have. Raises as `convert_files` does.
    """
    for spec in tensor_specs(source.model):
        require_convertible(spec.name, source.dtype(spec.name), target)
    tensors = [
        PlannedTensor(name, target or source.dtype(spec.name), shape, tuple(hf_pieces(spec, name)))
        for spec in tensor_specs(source.model)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    ]
    files = plan_safetensors(tensors, max_num_bytes)
    model = source.model.model_copy(update={"dtype": common_dtype([tensor.dtype for tensor in tensors])})

    def complete(directory: Path) -> dict[str, Any]:
        if index := safetensors_index(files):
            (directory / INDEX_NAME).write_text(index, encoding="utf-8")
        write_hf_files(directory, model, hf_files)
        return describe_hf_files(directory)

    convert_files(
        hf_directory,
        files,
        source,
        identity={
            "to": "hugging-face",
            "dtype": "keep" if target is None else dtype_name(target),
            "model": model.model_dump(mode="json"),
            "source": files_identity(source.directory),
        },
        complete=complete,
        manifest=describe_conversion(source.directory, model, target, **origin),
        entries={tensor.name: TensorEntry(dtype_name(tensor.dtype), tensor.shape) for tensor in tensors},
        expected=expected,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


def describe_conversion(
    directory: Path, model: ModelConfig, cast: torch.dtype | None, **source: Any
) -> dict[str, Any]:
    """What a converted directory's manifest says beside its hashes: source, cast and model."""
    return {
        "source": {"directory": directory.resolve().name, **source},
        "cast": None if cast is None else dtype_name(cast),
        "model": model.model_dump(mode="json"),
    }


def describe_hf_files(directory: Path) -> dict[str, Any]:
    """What a converted directory's manifest says of the files beside the weights, once they are written."""
    return {"tokenizer": tokenizer_fingerprint(directory), "generation": read_generation_config(directory)}


def require_convertible(name: str, dtype: torch.dtype, target: torch.dtype | None) -> None:
    """Raise UserError unless a tensor stored as `dtype` can become `target` (None: stay) in what we write."""
    if not dtype.is_floating_point:
        raise UserError(
            f"{name} is {dtype_name(dtype)}: only floating-point weights are converted, none quantized."
        )
    if target is None and dtype not in DTYPES.values():
        raise UserError(f"{name} is {dtype_name(dtype)}: choose bf16, fp16 or fp32 with --dtype.")


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def write_hf_files(
    directory: Path, model: ModelConfig, source: Path | None = None, special_tokens: Sequence[str] = ()
) -> None:
    """Write all that a Hugging Face directory holds beside the weights into the existing `directory`.

    config.json from `model`; tokenizer files and generation_config.json from directory `source`, as far as it has
    them (else a minimal generation_config.json). With `special_tokens` appended to the tokenizer. Raises UserError
    when a file of `source` is damaged.
    """
    if source is not None:
        read_generation_config(source)
    config = json.dumps(model_config_to_hf(model), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    generation = directory / "generation_config.json"
    if source is not None and (source / generation.name).is_file():
        shutil.copyfile(source / generation.name, generation)
    else:
        generation.write_text(json.dumps(generation_config_of(model), indent=2) + "\n", encoding="utf-8")
    if source is not None:
        copy_tokenizer(source, directory, special_tokens)


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json of the directory, None without. Raises UserError when transformers could not read it."""
    path = directory / "generation_config.json"
    return read_json_object(path) if path.is_file() else None


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """torch dtype of "bf16", "fp16" or "fp32"; None for None and "keep". Raises UserError for anything else."""
    if dtype is None or dtype == "keep":
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown. Write one of: {', '.join(DTYPES)}, keep.")
    return DTYPES[dtype]


def common_dtype(dtypes: Sequence[torch.dtype]) -> str:
    """The dtype that config.json states for these tensors: the one that most of them have."""
    return dtype_name(max(set(dtypes), key=list(dtypes).count))
