"""`meditron-train convert merge`: the average of several checkpoints."""

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


def merge(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B ...", help="Hugging Face directories or sharded checkpoints, two or more."
        ),
    ],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face directory to write.")],
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            help="uniform; ema:DECAY, by the steps of a run; or numbers with the sum 1: 0.5,0.25,0.25.",
        ),
    ] = "uniform",
    dtype: Dtype = "keep",
    max_ram: MaxRam = "4GiB",
    max_shard_size: MaxShardSize = "5GB",
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write the average of several checkpoints of one architecture as a Hugging Face directory.

    Summed in float64, rounded to float32 and to the dtype. Its manifest.json names the checkpoints with their hashes.
    After an interruption, the same command continues where it stopped. Under torchrun or srun, the processes share the
    work.

    \b
    Examples:
      meditron-train convert merge runs/a/checkpoints/step_0000?000 averaged
      meditron-train convert merge step_00001000 step_00002000 averaged \\
          --weights ema:0.9
      meditron-train convert merge base-hf instruct-hf between --weights 0.3,0.7
    """
    from meditron_train.checkpoint.convert.merge import merge_checkpoints

    limits = read_limits(max_ram, allow_nonfinite)
    with meet_ranks() as ranks, progress_bar("merging", hidden=not is_first(ranks)) as advance:
        used = merge_checkpoints(
            checkpoints, hf_dir, weights=weights, dtype=dtype, max_shard_size=max_shard_size, limits=limits,
            ranks=ranks, progress=advance,
        )  # fmt: skip
    if is_first(ranks):
        for checkpoint, weight in zip(checkpoints, used.values, strict=True):
            say(f"{weight:.6g} x {checkpoint}")
        say(f"Wrote {hf_dir}.")
