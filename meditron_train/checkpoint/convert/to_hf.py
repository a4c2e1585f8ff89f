"""From a sharded checkpoint to a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.convert.engine import (
    NO_LIMITS,
    Limits,
    Progress,
    convert_files,
    describe_conversion,
    describe_hf_files,
)
from meditron_train.checkpoint.convert.source_files import SourceFiles, files_identity
from meditron_train.checkpoint.convert.workspace import Alone, Ranks, require_absent
from meditron_train.checkpoint.dtypes import common_dtype, dtype_name, parse_dtype, require_convertible
from meditron_train.checkpoint.files.stored import Tensors
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY, read_generation_config, write_hf_files
from meditron_train.checkpoint.hf.plan import INDEX_NAME, plan_safetensors, safetensors_index
from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.checkpoint.manifest import MANIFEST_NAME, TensorEntry, read_tensor_hashes, require_intact
from meditron_train.checkpoint.megatron.source import MegatronSource
from meditron_train.checkpoint.planned import PlannedTensor
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import Piece, hf_pieces, hf_shapes, tensor_specs
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer
from meditron_train.config.model_config import ModelConfig
from meditron_train.files import sha256_file
from meditron_train.units import parse_num_bytes


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

    Vocabulary padding is removed and a tied `lm_head` left out. Memory: blocks of a few MiB. Every file of
    the checkpoint is checked against its manifest: before anything is written or, where it holds hashes of
    tensors, on the way. An interrupted call is continued by the next one with the same arguments.

    Args:
        checkpoint: the sharded checkpoint.
        hf_directory: directory to create.
        dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own.
        max_shard_size: "5GB", "500MB", … or bytes.
        limits, ranks, progress: as for `convert_files`.

    Raises:
        UserError: the output exists and is not empty, the checkpoint is not what its manifest says, or
            weights are not finite. Nothing is left behind then.
    """
    checkpoint = Path(checkpoint)
    target = parse_dtype(dtype)
    max_num_bytes = parse_num_bytes(max_shard_size)
    inputs = SourceFiles(checkpoint)
    source = ShardedSource(checkpoint, read_once=True)
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
        inputs,
        hf_directory,
        hf_files,
        target=target,
        max_num_bytes=max_num_bytes,
        origin={
            "format": "sharded",
            "step": source.meta.get("step"),
            "manifest_sha256": sha256_file(checkpoint / MANIFEST_NAME),
        },
        expected=hashes,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


def rewrite_hf(
    source_directory: str | Path,
    hf_directory: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits = NO_LIMITS,
    progress: Progress | None = None,
) -> None:
    """Write a Hugging Face directory again, with other dtypes or shards where that is asked for; as `export_hf`.

    The files that transformers does not need (a model card, other formats of the weights) stay behind.
    """
    source_directory = Path(source_directory)
    target, max_num_bytes = parse_dtype(dtype), parse_num_bytes(max_shard_size)
    require_absent(hf_directory, source_directory)
    inputs = SourceFiles(source_directory)
    model, source = open_hf_model(source_directory, read_once=True)
    check_tokenizer(source_directory, model.vocab_size)
    for name in hf_shapes(model):
        require_convertible(name, source.dtype(name), target)
    write_hf_tensors(
        source,
        [
            PlannedTensor(name, target or source.dtype(name), shape, (Piece(name, 0, shape[0], name),))
            for name, shape in hf_shapes(model).items()
        ],
        model,
        inputs,
        hf_directory,
        source_directory,
        max_num_bytes=max_num_bytes,
        identity={"dtype": dtype or "keep", "source": files_identity(source_directory)},
        manifest=describe_conversion(source_directory, model, target, format="hugging-face"),
        expected=read_tensor_hashes(source_directory),
        limits=limits,
        ranks=None,
        progress=progress,
    )


def write_hf_model(
    source: ShardedSource | MegatronSource,
    inputs: SourceFiles,
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

    Args:
        source: the model.
        inputs: the files that are read.
        hf_directory: directory to create.
        hf_files: directory with the tokenizer.
        target: dtype of all tensors; None: each keeps its own.
        max_num_bytes: of a file of weights.
        origin: what the manifest says of the source.
        expected: hashes that the source's tensors must have.
        limits, ranks, progress: as for `convert_files`.

    Raises:
        UserError, MeditronError: as `convert_files`.
    """
    for spec in tensor_specs(source.model):
        require_convertible(spec.name, source.dtype(spec.name), target)
    tensors = [
        PlannedTensor(name, target or source.dtype(spec.name), shape, tuple(hf_pieces(spec, name)))
        for spec in tensor_specs(source.model)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    ]
    write_hf_tensors(
        source,
        tensors,
        source.model,
        inputs,
        hf_directory,
        hf_files,
        max_num_bytes=max_num_bytes,
        identity={
            "dtype": "keep" if target is None else dtype_name(target),
            "source": files_identity(source.directory),
        },
        manifest=describe_conversion(source.directory, source.model, target, **origin),
        expected=expected,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


def write_hf_tensors(
    source: Tensors,
    tensors: Sequence[PlannedTensor],
    model: ModelConfig,
    inputs: SourceFiles,
    hf_directory: str | Path,
    hf_files: Path | None,
    *,
    max_num_bytes: int,
    identity: Mapping[str, Any],
    manifest: Mapping[str, Any],
    limits: Limits,
    ranks: Ranks | None,
    progress: Progress | None,
    expected: Mapping[str, str] | None = None,
    special_tokens: Sequence[str] = (),
    generation_from: Path | None = None,
) -> None:
    """Write planned tensors of `source`, config and tokenizer as a Hugging Face directory; collective.

    Args:
        identity: what decides the tensors' content, beside the plan.
        manifest: what it says of the source; the model is added with the dtype that the tensors have.
        special_tokens: to be added to the tokenizer.
        generation_from: where generation_config.json lies, if it is not among the hf_files.
        inputs, hf_files, max_num_bytes, expected, limits, ranks, progress: as of `write_hf_model`.
    """
    files = plan_safetensors(tensors, max_num_bytes)
    model = model.model_copy(update={"dtype": common_dtype([tensor.dtype for tensor in tensors])})

    def complete(directory: Path) -> dict[str, Any]:
        if index := safetensors_index(files):
            (directory / INDEX_NAME).write_text(index, encoding="utf-8")
        write_hf_files(directory, model, hf_files, special_tokens, generation_from=generation_from)
        return describe_hf_files(directory)

    convert_files(
        hf_directory,
        files,
        source,
        inputs,
        identity={"to": "hugging-face", "model": model.model_dump(mode="json"), **identity},
        complete=complete,
        manifest={**manifest, "model": model.model_dump(mode="json")},
        entries={tensor.name: TensorEntry(dtype_name(tensor.dtype), tensor.shape) for tensor in tensors},
        expected=expected,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )
