"""From a Hugging Face directory to a sharded checkpoint, by blocks of rows, without building the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.conversion import NO_LIMITS, Limits, Progress, convert_files, files_identity
from meditron_train.checkpoint.export import (
    HF_SUBDIRECTORY,
    common_dtype,
    describe_conversion,
    describe_hf_files,
    dtype_name,
    parse_dtype,
    require_convertible,
    write_hf_files,
)
from meditron_train.checkpoint.hf_map import TensorSpec, megatron_pieces, tensor_specs
from meditron_train.checkpoint.hf_read import HFSource, open_hf_model
from meditron_train.checkpoint.manifest import TensorEntry, read_tensor_hashes
from meditron_train.checkpoint.megatron_write import meta_json, plan_distcp, write_index
from meditron_train.checkpoint.stream import PlannedTensor
from meditron_train.checkpoint.tokenizer_files import check_tokenizer
from meditron_train.checkpoint.workspace import Ranks, require_absent
from meditron_train.errors import UserError


def hf_to_megatron(
    hf_directory: str | Path,
    checkpoint: str | Path,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model of a Hugging Face directory as a sharded checkpoint that any parallel layout can load.

    dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own. vocab_multiple: the embedding is padded
    with zero rows to a multiple of it. Memory: blocks of a few MiB. An interrupted call is continued by the next one
    with the same arguments. Raises UserError when the model is not supported, is damaged, has weights that are not
    finite, or the output exists and is not empty; nothing is left behind then.
    """
    hf_directory = Path(hf_directory)
    target = parse_dtype(dtype)
    require_absent(checkpoint, hf_directory)
    model, source = open_hf_model(hf_directory, read_once=True)
    check_tokenizer(hf_directory, model.vocab_size)
    padded_vocab_size = model.padded_vocab_size(tp=1, multiple=vocab_multiple)
    specs = tensor_specs(model)
    for name in (name for spec in specs for name in spec.hf_names):
        require_convertible(name, source.dtype(name), target)
    dtypes = [target or _dtype_of(spec, source) for spec in specs]
    model = model.model_copy(update={"dtype": common_dtype(dtypes)})
    files = plan_distcp(
        PlannedTensor(
            spec.name,
            tensor_dtype,
            spec.padded_shape(padded_vocab_size),
            tuple(megatron_pieces(spec, padded_vocab_size)),
        )
        for spec, tensor_dtype in zip(specs, dtypes, strict=True)
    )
    entries = {
        name: TensorEntry(dtype_name(tensor_dtype), shape)
        for spec, tensor_dtype in zip(specs, dtypes, strict=True)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }

    def complete(directory: Path) -> dict[str, Any]:
        write_index(directory, files)
        meta = json.dumps(meta_json(model, padded_vocab_size), indent=2) + "\n"
        (directory / "meta.json").write_text(meta, encoding="utf-8")
        (directory / HF_SUBDIRECTORY).mkdir(exist_ok=True)
        write_hf_files(directory / HF_SUBDIRECTORY, model, hf_directory)
        return describe_hf_files(directory / HF_SUBDIRECTORY)

    convert_files(
        checkpoint,
        files,
        source,
        identity={"to": "sharded", "dtype": dtype or "keep", "source": files_identity(hf_directory)},
        complete=complete,
        manifest=describe_conversion(hf_directory, model, target, format="hugging-face"),
        entries=entries,
        expected=read_tensor_hashes(hf_directory),  # where an earlier conversion has left them
        limits=limits,
        ranks=ranks,
        progress=progress,
    )


def _dtype_of(spec: TensorSpec, source: HFSource) -> torch.dtype:
    dtypes = {source.dtype(name) for name in spec.hf_names}
    if len(dtypes) > 1:
        raise UserError(
            f"{', '.join(spec.hf_names)} have different dtypes and become one tensor: choose one with --dtype."
        )
    return dtypes.pop()
