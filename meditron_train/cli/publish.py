"""`meditron-train publish`: a model as a directory that may be passed on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meditron_train.cli.conversion import Dtype, MaxRam, MaxShardSize, read_limits, say
from meditron_train.cli.progress import progress_bar


def publish(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="Run directory, sharded checkpoint or Hugging Face directory."),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Directory to write.")],
    base_license: Annotated[
        str | None,
        typer.Option("--base-license", help="License of the base model: llama2, apache-2.0, mit, ..."),
    ] = None,
    license_file: Annotated[
        Path | None, typer.Option("--license-file", help="Text of that license (default: the base's own).")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's id on the Hub, for the model card.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", metavar="FILE.json", help="Result of `evaluate --output`; may be repeated."
        ),
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", help="Repository to upload to, if there is a token (HF_TOKEN).")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; else only you see it.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", help="Sign with this private key (ECDSA).")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="GPU of the training, where the run does not tell, for its energy."),
    ] = None,
    pue: Annotated[
        float, typer.Option("--pue", min=1, help="Power usage effectiveness of the center.")
    ] = 1.2,
    carbon: Annotated[float, typer.Option("--carbon", min=0, help="kg of CO2 per kWh of the grid.")] = 0.4,
    dtype: Dtype = "keep",
    max_ram: MaxRam = "4GiB",
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Write a model with its card, licenses and signature, checked against the checkpoint by its logits.

    OUT_DIR appears only when all of it is there and transformers computes the checkpoint's logits from it. Without
    --repo and a token, nothing leaves this machine.

    \b
    Examples:
      meditron-train publish runs/llama2-7b my-model --base-license llama2 \\
          --evaluation scores.json
      meditron-train publish averaged my-model --base-license llama2 \\
          --license-file LICENSE.txt --sign key.pem --repo my-lab/my-model
    """
    from meditron_train.flows.publish.publish import Wishes
    from meditron_train.flows.publish.publish import publish as run

    wishes = Wishes(
        base_license, license_file, base_model, tuple(evaluation or ()), repo, public, sign, gpu,
        None if dtype == "keep" else dtype, max_shard_size, pue, carbon,
    )  # fmt: skip
    with progress_bar("exporting") as advance:
        done = run(checkpoint, out_dir, wishes, limits=read_limits(max_ram, False), progress=advance)
    check = done.check
    say(
        f"Wrote {done.directory}: {check.num_tensors} tensors equal to the checkpoint's, logits of transformers "
        f"{check.transformers} within {check.max_difference:.1e}{', signed' if done.is_signed else ''}."
    )
    if done.url is not None:
        say(f"Uploaded: {done.url}")
    for sentence in done.to_do:
        say(f"To do: {sentence}")
