"""From a Hugging Face directory to a sharded checkpoint, one tensor at a time, without building the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from meditron_train.checkpoint.export import (
    HF_SUBDIRECTORY,
    common_dtype,
    parse_dtype,
    require_memory,
    write_hf_files,
)
from meditron_train.checkpoint.hf_map import TensorSpec, rank_slice, tensor_specs
from meditron_train.checkpoint.hf_read import HFSource, open_hf_model
from meditron_train.checkpoint.megatron_write import MegatronWriter, meta_json
from meditron_train.checkpoint.publish import publish
from meditron_train.checkpoint.tokenizer_files import check_tokenizer
from meditron_train.errors import UserError


def hf_to_megatron(
    hf_directory: str | Path,
    checkpoint: str | Path,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    max_ram_num_bytes: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write the model of a Hugging Face directory as a sharded checkpoint that any parallel layout can load.

    dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own. vocab_multiple: the embedding is padded
    with zero rows to a multiple of it. progress: called with each tensor's name and bytes once it is written.
    Memory: the largest tensor three times, refused when that is more than max_ram_num_bytes. Raises UserError when
    the model is not a supported Llama, is damaged, or the output exists and is not empty; nothing is left behind then.
    """
    hf_directory = Path(hf_directory)
    target = parse_dtype(dtype)
    model, source = open_hf_model(hf_directory)
    check_tokenizer(hf_directory, model.vocab_size)
    padded_vocab_size = model.padded_vocab_size(tp=1, multiple=vocab_multiple)
    specs = tensor_specs(model)
    dtypes = [target or _dtype_of(spec, source) for spec in specs]
    model = model.model_copy(update={"dtype": common_dtype(dtypes)})
    shapes = [spec.padded_shape(padded_vocab_size) for spec in specs]
    require_memory(zip(shapes, dtypes, strict=True), max_ram_num_bytes)
    num_bytes = sum(math.prod(shape) * each.itemsize for shape, each in zip(shapes, dtypes, strict=True))
    with publish(checkpoint, num_bytes=num_bytes, with_manifest=True) as temporary:
        with MegatronWriter(temporary) as writer:
            for spec, tensor_dtype in zip(specs, dtypes, strict=True):
                tensor = rank_slice(spec, source, padded_vocab_size=padded_vocab_size).to(tensor_dtype)
                writer.write(spec.name, tensor)
                if progress is not None:
                    progress(spec.name, tensor.numel() * tensor_dtype.itemsize)
        meta = json.dumps(meta_json(model, padded_vocab_size), indent=2) + "\n"
        (temporary / "meta.json").write_text(meta, encoding="utf-8")
        (temporary / HF_SUBDIRECTORY).mkdir()
        write_hf_files(temporary / HF_SUBDIRECTORY, model, hf_directory)


def _dtype_of(spec: TensorSpec, source: HFSource) -> torch.dtype:
    dtypes = {source.dtype(name) for name in spec.hf_names}
    if len(dtypes) > 1:
        raise UserError(
            f"{', '.join(spec.hf_names)} have different dtypes and become one tensor: choose one with --dtype."
        )
    return dtypes.pop()
