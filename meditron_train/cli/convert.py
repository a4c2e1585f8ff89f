"""`meditron-train convert`: between Hugging Face directories and sharded checkpoints, and the proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meditron_train.cli.adapters import add_tokens_command, merge_adapter_command
from meditron_train.cli.conversion import (
    AllowNonfinite,
    Dtype,
    MaxRam,
    MaxShardSize,
    is_first,
    meet_ranks,
    read_limits,
    say,
    tell,
)
from meditron_train.cli.merge import merge
from meditron_train.cli.progress import progress_bar
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory
from meditron_train.units import format_num_bytes

if TYPE_CHECKING:
    from meditron_train.checkpoint.megatron.source import MegatronOptions
    from meditron_train.verify.verify import Comparison

app = typer.Typer(
    help="Convert, verify and inspect checkpoints.", no_args_is_help=True, rich_markup_mode=None
)

app.command("merge-adapter")(merge_adapter_command)
app.command("add-tokens")(add_tokens_command)

_MAX_LISTED = 50
_SIDE = "Hugging Face directory, sharded checkpoint, or a converted directory's manifest.json alone."


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command("hf-to-megatron")
def hf_to_megatron_command(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face model directory.")],
    ckpt_dir: Annotated[Path, typer.Argument(metavar="CKPT_DIR", help="Sharded checkpoint to write.")],
    dtype: Dtype = "keep",
    for_program: Annotated[
        str,
        typer.Option(
            "--for", help="Who loads it: meditron-train, or megatron-lm, with the names of its own GPTModel."
        ),
    ] = "meditron-train",
    max_ram: MaxRam = "4GiB",
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a Hugging Face model as a sharded checkpoint that any parallel layout loads.

    After an interruption, the same command continues where it stopped. Under torchrun or srun, the processes
    share the work.

    \b
    Examples:
      meditron-train convert hf-to-megatron models/Llama-2-7b-hf llama2-7b
      meditron-train convert hf-to-megatron models/Llama-2-7b-hf llama2-7b \\
          --for megatron-lm --dtype bf16
    """
    from meditron_train.checkpoint.convert.from_hf import hf_to_megatron_lm, hf_to_sharded

    writers: dict[str, Callable[..., None]] = {
        "meditron-train": hf_to_sharded,
        "megatron-lm": hf_to_megatron_lm,
    }
    if for_program not in writers:
        raise UserError(f"--for is {for_program!r}. Write {' or '.join(writers)}")
    write = writers[for_program]
    limits = read_limits(max_ram, allow_nonfinite)
    with meet_ranks() as ranks, progress_bar("converting", hidden=not is_first(ranks)) as advance:
        write(hf_dir, ckpt_dir, dtype=dtype, limits=limits, ranks=ranks, progress=advance)
    if is_first(ranks):
        say(f"Wrote {ckpt_dir}. Check it with: meditron-train convert verify {hf_dir} {ckpt_dir}")


Tokenizer = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Directory with the tokenizer of another program's checkpoint."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Hugging Face directory whose config.json describes another program's model."
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option("--vocab-size", help="Tokens of another program's model, without padding.", min=1),
]
Rotary = Annotated[
    str,
    typer.Option(
        "--rotary", help="Query and key rows of another program's model: auto, half or interleaved."
    ),
]


@app.command("megatron-to-hf")
def megatron_to_hf_command(
    ckpt_dir: Annotated[
        Path,
        typer.Argument(metavar="CKPT_DIR", help="Sharded checkpoint, or one of Megatron-LM or Megatron-LLM."),
    ],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face directory to write.")],
    dtype: Dtype = "keep",
    max_ram: MaxRam = "4GiB",
    max_shard_size: MaxShardSize = "5GB",
    allow_nonfinite: AllowNonfinite = False,
    tokenizer: Tokenizer = None,
    config: Config = None,
    vocab_size: VocabSize = None,
    rotary: Rotary = "auto",
) -> None:
    """Write a checkpoint as a Hugging Face directory that transformers loads.

    After an interruption, the same command continues where it stopped. Under torchrun or srun, the processes
    share the work.

    \b
    Examples:
      meditron-train convert megatron-to-hf \\
          runs/llama2-7b/checkpoints/step_00002000 models/ours
      meditron-train convert megatron-to-hf megatron-lm/run models/ours \\
          --tokenizer models/Llama-2-7b-hf
    """
    from meditron_train.checkpoint.convert.megatron_to_hf import megatron_to_hf
    from meditron_train.checkpoint.convert.to_hf import export_hf
    from meditron_train.checkpoint.megatron.source import is_megatron_directory

    limits, options = (
        read_limits(max_ram, allow_nonfinite),
        _megatron_options(tokenizer, config, vocab_size, rotary),
    )
    _require_megatron(ckpt_dir, options)
    is_megatron = is_megatron_directory(ckpt_dir)
    has_tokenizer = True
    with meet_ranks() as ranks, progress_bar("converting", hidden=not is_first(ranks)) as advance:
        arguments: dict[str, Any] = {
            "dtype": dtype, "max_shard_size": max_shard_size, "limits": limits, "ranks": ranks, "progress": advance,
        }  # fmt: skip
        if is_megatron:
            source = megatron_to_hf(ckpt_dir, hf_dir, options or _megatron_defaults(), **arguments)
            has_tokenizer = source.tokenizer is not None
        else:
            export_hf(ckpt_dir, hf_dir, **arguments)
    if is_first(ranks):
        if not has_tokenizer:
            say("No tokenizer was given (--tokenizer DIR): copy its files there before the model is used.")
        say(f"Wrote {hf_dir}. Check it with: meditron-train convert verify {ckpt_dir} {hf_dir}")


app.command("merge")(merge)


@app.command("reshard")
def reshard_command(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Sharded checkpoint, or one of Megatron-LM or Megatron-LLM.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks.", min=1)] = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline stages.", min=1)] = 1,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer/--no-optimizer", help="With the optimizer's state, where there is one."),
    ] = True,
    tokenizer: Tokenizer = None,
    config: Config = None,
    vocab_size: VocabSize = None,
    rotary: Rotary = "auto",
) -> None:
    """Write a checkpoint as Megatron's per-rank files, for other tools; loading here never needs it.

    \b
    Examples:
      meditron-train convert reshard llama2-7b llama2-7b-tp8 --tp 8
    """
    from meditron_train.checkpoint.convert.to_rank_files import reshard

    options = _megatron_options(tokenizer, config, vocab_size, rotary)
    _require_megatron(source, options)
    with progress_bar("writing") as advance:
        result = reshard(
            source, target, tp=tp, pp=pp, with_optimizer=optimizer, options=options, progress=advance
        )
    state = "weights and optimizer state" if result.with_optimizer else "weights"
    say(f"Wrote {target}/{result.iteration}: {tp} x {pp} ranks, {state}.")


@app.command("verify")
def verify_command(
    a: Annotated[Path, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[Path, typer.Argument(metavar="B", help=_SIDE)],
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Compare after a cast to bf16, fp16 or fp32; keep: none is declared."),
    ] = "keep",
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Also run both in fp32, through transformers and our own code."),
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare two models bit for bit; exit 0 only if they are equal, else 1 and what differs.

    \b
    Examples:
      meditron-train convert verify models/Llama-2-7b-hf llama2-7b
      meditron-train convert verify models/ours ours/manifest.json --dtype bf16
    """
    from meditron_train.verify.verify import verify

    with progress_bar("comparing", hidden=json_output) as advance:
        result = verify(a, b, dtype=dtype, logits=logits, progress=advance)
    if json_output:
        _print_json(_comparison_json(a, b, result))
    else:
        _print_comparison(result)
    raise typer.Exit(1 if result.differences else 0)


@app.command("inspect")
def inspect_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face directory or sharded checkpoint.")
    ],
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="Read the files and check their hashes.")
    ] = True,
    json_output: Json = False,
) -> None:
    """Show tensors, shapes, dtypes, layout, step and hashes, and whether the directory is intact.

    Exit codes: 0 intact; 1 broken, with what is wrong; 2 not a model, or too damaged to be described.

    \b
    Examples:
      meditron-train convert inspect runs/llama2-7b/checkpoints/step_00002000
      meditron-train convert inspect models/Llama-2-7b-hf --no-hashes --json
    """
    from meditron_train.verify.inspect import inspect_directory

    with progress_bar("reading", hidden=json_output) as advance:
        description = inspect_directory(directory, hashes=hashes, progress=advance)
    if json_output:
        _print_json(description)
    else:
        _print_description(description)
    raise typer.Exit(0 if description["intact"] else 1)


def _megatron_defaults() -> MegatronOptions:
    from meditron_train.checkpoint.megatron.source import MegatronOptions

    return MegatronOptions()


def _megatron_options(
    tokenizer: Path | None, config: Path | None, vocab_size: int | None, rotary: str
) -> MegatronOptions | None:
    """None when the user gave none of them."""
    from meditron_train.checkpoint.megatron.source import MegatronOptions

    if rotary not in ("auto", "half", "interleaved"):
        raise UserError(f"--rotary is {rotary!r}. Write auto, half or interleaved")
    options = MegatronOptions(tokenizer, config, vocab_size, rotary)  # type: ignore[arg-type]
    return None if options == MegatronOptions() else options


def _require_megatron(checkpoint: Path, options: MegatronOptions | None) -> None:
    from meditron_train.checkpoint.megatron.source import is_megatron_directory

    if not checkpoint.is_dir():
        raise UserError(describe_missing_directory(checkpoint))
    if options is not None and not is_megatron_directory(checkpoint):
        raise UserError(
            f"{checkpoint} is not a checkpoint of Megatron-LM or Megatron-LLM: --tokenizer, --config, --vocab-size and "
            "--rotary are for those. Leave them out"
        )


def _comparison_json(a: Path, b: Path, result: Comparison) -> dict[str, Any]:
    logits = result.logits
    return {
        "a": str(a),
        "b": str(b),
        "equal": not result.differences,
        "num_tensors": result.num_tensors,
        "num_bytes": result.num_bytes,
        "cast": result.cast,
        "max_logit_difference": logits and logits.max_difference,
        "kl_divergence": logits and logits.kl_divergence,
        "ours_max_logit_difference": logits and logits.ours_max_difference,
        "ours_kl_divergence": logits and logits.ours_kl_divergence,
        "differences": [{"kind": d.kind, "name": d.name, "message": d.message} for d in result.differences],
    }


def _print_comparison(result: Comparison) -> None:
    for difference in result.differences[:_MAX_LISTED]:
        tell(str(difference))
    if len(result.differences) > _MAX_LISTED:
        tell(f"… and {len(result.differences) - _MAX_LISTED} more (all of them with --json)")
    if logits := result.logits:
        tell(
            f"logits: max |Δ| {logits.max_difference:.3e}, KL {logits.kl_divergence:.3e} nats per token\n"
            f"  A by transformers, B by meditron-train: max |Δ| {logits.ours_max_difference:.3e}, "
            f"KL {logits.ours_kl_divergence:.3e}"
        )
    if result.differences:
        tell(
            f"different: {len(result.differences)} differences in {result.num_tensors} tensors, config and tokenizer"
        )
    else:
        cast = f" after the declared cast to {result.cast}" if result.cast else ""
        size, tokenizer = format_num_bytes(result.num_bytes), ", tokenizer" if result.with_tokenizers else ""
        tell(f"equal: {result.num_tensors} tensors ({size}) bit for bit{cast}, config{tokenizer}")


def _print_description(description: dict[str, Any]) -> None:
    tell(f"{description['directory']}: {description['format']}, {description['num_parameters']:,} parameters")
    if "model" in description:
        _print_model(description["model"])
    keys = (
        "base",
        "scale",
        "step",
        "tokens",
        "samples",
        "layout",
        "contains",
        "padded_vocab_size",
        "versions",
    )
    for key in keys:
        if key in description:
            tell(f"  {key}: {description[key]}")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in description["dtypes"].items())
    tell(f"  tensors: {description['num_tensors']} ({dtypes}), {format_num_bytes(description['num_bytes'])}")
    width = max((len(tensor["name"]) for tensor in description["tensors"]), default=0)
    for tensor in description["tensors"]:
        tell(
            f"    {tensor['name']:{width}}  {tensor['dtype']:9} {tensor['shape']!s:18} {', '.join(tensor['files'])}"
        )
    tell("  files:")
    for file in description["files"]:
        tell(f"    {file.get('sha256', '-')[:16]:16}  {file['num_bytes']:>14,}  {file['name']}")
    if description["problems"]:
        tell("BROKEN:")
        for problem in description["problems"]:
            tell(f"  {problem}")
    else:
        tell("intact")


def _print_model(model: dict[str, Any]) -> None:
    tell(
        f"  model: {model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_heads']} heads "
        f"({model['num_kv_heads']} KV) of {model['head_dim']}, feed-forward {model['intermediate_size']}, "
        f"vocabulary {model['vocab_size']}{', tied' if model['tie_embeddings'] else ''}"
    )
    rope = model["rope"]
    tell(
        f"  RoPE: {rope['kind']}, theta {rope['theta']:g}"
        + (f", factor {rope['factor']:g}" * (rope["kind"] != "default"))
    )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))  # ASCII: names in files may be what a terminal cannot show
