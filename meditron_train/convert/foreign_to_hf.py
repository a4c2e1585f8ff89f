"""From a checkpoint of Megatron-LM or Megatron-LLM to a Hugging Face directory, in blocks of rows."""

from __future__ import annotations

from pathlib import Path

from meditron_train.checkpoint.conversion import Limits, Progress
from meditron_train.checkpoint.export import parse_dtype, read_generation_config, write_hf_model
from meditron_train.checkpoint.foreign import ForeignOptions, ForeignSource
from meditron_train.checkpoint.hf_write import parse_num_bytes
from meditron_train.checkpoint.tokenizer_files import check_tokenizer
from meditron_train.checkpoint.workspace import Ranks, require_absent


def foreign_to_hf(
    checkpoint: str | Path,
    hf_directory: str | Path,
    options: ForeignOptions,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    limits: Limits,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> ForeignSource:
    """Write the model of another program's checkpoint as a Hugging Face directory with manifest.json; collective.

    dtype, max_shard_size, limits, ranks, progress: as for `export_hf`. Returns the source. Raises UserError when the
    checkpoint cannot be read, when an option is missing that would tell what it does not, or when the output exists;
    nothing is left behind then.
    """
    target = parse_dtype(dtype)
    max_num_bytes = parse_num_bytes(max_shard_size)
    source = ForeignSource(checkpoint, options)
    if source.tokenizer is not None:
        check_tokenizer(source.tokenizer, source.model.vocab_size)
        read_generation_config(source.tokenizer)
    require_absent(hf_directory, checkpoint)
    write_hf_model(
        source,
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
