"""`meditron-train convert merge-adapter` and `convert add-tokens`: around the training of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meditron_train.cli.conversion import (
    AllowNonfinite,
    Dtype,
    MaxRam,
    MaxShardSize,
    is_first,
    meet_ranks,
    read_limits,
    say,
)
from meditron_train.cli.progress import progress_bar


def merge_adapter_command(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The model it was trained on: Hugging Face or sharded.")
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory of PEFT, or a checkpoint of a run with lora.")
    ],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face directory to write.")],
    dtype: Dtype = "keep",
    max_ram: MaxRam = "4GiB",
    max_shard_size: MaxShardSize = "5GB",
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a model with its LoRA adapter added to the weights, as a Hugging Face directory.

    The sum is computed in float64, rounded to float32 and to the dtype. An adapter for another base is refused.
    After an interruption, the same command continues where it stopped. Under torchrun or srun, the processes
    share the work.

    \b
    Examples:
      meditron-train convert merge-adapter models/Llama-2-7b-hf \\
          runs/lora/adapter models/merged
    """
    from meditron_train.checkpoint.convert.adapters import merge_adapter

    limits = read_limits(max_ram, allow_nonfinite)
    with meet_ranks() as ranks, progress_bar("merging", hidden=not is_first(ranks)) as advance:
        merge_adapter(
            base,
            adapter,
            hf_dir,
            dtype=dtype,
            max_shard_size=max_shard_size,
            limits=limits,
            ranks=ranks,
            progress=advance,
        )
    if is_first(ranks):
        say(f"Wrote {hf_dir}. Try it: meditron-train generate {hf_dir} --prompt ...")


def add_tokens_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Hugging Face directory with its tokenizer.")],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face directory to write.")],
    tokens: Annotated[list[str], typer.Option("--token", help="A token to add; may be repeated.")],
    max_ram: MaxRam = "4GiB",
    max_shard_size: MaxShardSize = "5GB",
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a model whose tokenizer and embedding have room for more tokens, as a Hugging Face directory.

    A new row of the embedding (and of the output layer) is the mean of the old ones. Adapters do not hold such rows:
    extend their base first.

    \b
    Examples:
      meditron-train convert add-tokens models/Llama-2-7b-hf models/with-chat \\
          --token "<|im_start|>" --token "<|im_end|>"
    """
    from meditron_train.checkpoint.convert.tokens import add_tokens

    limits = read_limits(max_ram, allow_nonfinite)
    with progress_bar("writing") as advance:
        num_rows = add_tokens(
            base, hf_dir, tuple(tokens), max_shard_size=max_shard_size, limits=limits, progress=advance
        )
    say(f"Wrote {hf_dir}: {num_rows} new rows. Name it in model.from and data.tokenizer.")
