"""From a checkpoint of Megatron-LM or Megatron-LLM to a Hugging Face directory, in blocks of rows."""

from __future__ import annotations

from pathlib import Path

from meditron_train.checkpoint.convert.engine import Limits, Progress
from meditron_train.checkpoint.convert.source_files import open_megatron
from meditron_train.checkpoint.convert.to_hf import write_hf_model
from meditron_train.checkpoint.convert.workspace import Ranks, require_absent
from meditron_train.checkpoint.dtypes import parse_dtype
from meditron_train.checkpoint.hf.directory import read_generation_config
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer
from meditron_train.units import parse_num_bytes


def megatron_to_hf(
    checkpoint: str | Path,
    hf_directory: str | Path,
    options: MegatronOptions,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> MegatronSource:
    """Write the model of another program's checkpoint as a Hugging Face directory with manifest.json; collective.

    Args:
        checkpoint: the other program's directory.
        hf_directory: directory to create.
        options: what the checkpoint does not say.
        dtype, max_shard_size, limits, ranks, progress: as for `export_hf`.

    Returns:
        The source.

    Raises:
        UserError: the checkpoint cannot be read, an option is missing that would say what it does not, or the
            output exists. Nothing is left behind then.
    """
    target = parse_dtype(dtype)
    max_num_bytes = parse_num_bytes(max_shard_size)
    inputs, source = open_megatron(Path(checkpoint), options)
    if source.tokenizer is not None:
        check_tokenizer(source.tokenizer, source.model.vocab_size)
        read_generation_config(source.tokenizer)
    require_absent(hf_directory, checkpoint, source.tokenizer, options.config)
    write_hf_model(
        source,
        inputs,
        hf_directory,
        source.tokenizer,
        target=target,
        max_num_bytes=max_num_bytes,
        origin={"format": "megatron", "step": source.iteration},
        expected=None,
        limits=limits,
        ranks=ranks,
        progress=progress,
    )
    return source
