"""From a sharded checkpoint to a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from meditron_train.checkpoint.hf_config import generation_config_of, model_config_to_hf
from meditron_train.checkpoint.hf_map import Shape, tensor_specs, to_hf
from meditron_train.checkpoint.hf_write import HFWriter, TensorPlan, format_num_bytes, parse_num_bytes
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.megatron_read import MegatronSource
from meditron_train.checkpoint.publish import publish, require_absent
from meditron_train.checkpoint.tokenizer_files import check_tokenizer, copy_tokenizer, read_json_object
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
    max_ram_num_bytes: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write the model of a finished sharded checkpoint as a Hugging Face directory.

    dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own. max_shard_size: "5GB", "500MB", … or bytes.
    progress: called with each Hugging Face tensor's name and its bytes once it is written. Vocabulary padding is
    removed and a tied `lm_head` left out. Memory: the largest tensor three times, refused when that is more than
    max_ram_num_bytes. Every file of the checkpoint is hashed before anything is written. Raises UserError when the
    output exists and is not empty, or the checkpoint is not what its manifest says; nothing is left behind then.
    """
    checkpoint = Path(checkpoint)
    target = parse_dtype(dtype)
    max_num_bytes = parse_num_bytes(max_shard_size)
    source = MegatronSource(checkpoint)
    check_tokenizer(checkpoint / HF_SUBDIRECTORY, source.model.vocab_size)
    specs = tensor_specs(source.model)
    plans = [
        TensorPlan(name, target or source.dtype(spec.name), shape)
        for spec in specs
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    ]
    require_memory(
        [(source.shape(spec.name), target or source.dtype(spec.name)) for spec in specs], max_ram_num_bytes
    )
    check_generation_config(checkpoint / HF_SUBDIRECTORY)
    require_absent(hf_directory)
    require_intact(checkpoint)
    with publish(hf_directory, num_bytes=sum(plan.num_bytes for plan in plans)) as temporary:
        with HFWriter(temporary, plans, max_num_bytes) as writer:
            for spec in specs:
                for name, tensor in to_hf(spec, source.read(spec.name)).items():
                    writer.write(name, tensor)
                    if progress is not None:
                        progress(name, tensor.numel() * (target or tensor.dtype).itemsize)
        model = source.model.model_copy(update={"dtype": common_dtype([plan.dtype for plan in plans])})
        write_hf_files(temporary, model, checkpoint / HF_SUBDIRECTORY)


def write_hf_files(
    directory: Path, model: ModelConfig, source: Path | None = None, special_tokens: Sequence[str] = ()
) -> None:
    """Write all that a Hugging Face directory holds beside the weights into the existing `directory`.

    config.json from `model`; tokenizer files and generation_config.json from directory `source`, as far as it has
    them (else a minimal generation_config.json). With `special_tokens` appended to the tokenizer. Raises UserError
    when a file of `source` is damaged.
    """
    if source is not None:
        check_generation_config(source)
    config = json.dumps(model_config_to_hf(model), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    generation = directory / "generation_config.json"
    if source is not None and (source / generation.name).is_file():
        shutil.copyfile(source / generation.name, generation)
    else:
        generation.write_text(json.dumps(generation_config_of(model), indent=2) + "\n", encoding="utf-8")
    if source is not None:
        copy_tokenizer(source, directory, special_tokens)


def check_generation_config(directory: Path) -> None:
    """Raise UserError when the directory has a generation_config.json that transformers could not read."""
    path = directory / "generation_config.json"
    if path.is_file():
        read_json_object(path)


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """torch dtype of "bf16", "fp16" or "fp32"; None for None and "keep". Raises UserError for anything else."""
    if dtype is None or dtype == "keep":
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown. Write one of: {', '.join(DTYPES)}, keep.")
    return DTYPES[dtype]


def require_memory(tensors: Iterable[tuple[Shape, torch.dtype]], max_ram_num_bytes: int | None) -> None:
    """Raise UserError when the largest of the tensors, held three times over, exceeds the memory allowed.

    Three times: as read, rearranged, and cast.
    """
    needed = 3 * max(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    if max_ram_num_bytes is not None and needed > max_ram_num_bytes:
        raise UserError(
            f"--max-ram is {format_num_bytes(max_ram_num_bytes)}, but the largest tensor needs "
            f"{format_num_bytes(needed)} (three times its size). "
            f"Write --max-ram {math.ceil(needed / 2**20)}MiB or more."
        )


def common_dtype(dtypes: Sequence[torch.dtype]) -> str:
    """The dtype that config.json states for these tensors: the one that most of them have."""
    return str(max(set(dtypes), key=list(dtypes).count)).removeprefix("torch.")
