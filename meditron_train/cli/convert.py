"""`meditron-train convert`: between Hugging Face directories and sharded checkpoints, and the proof."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meditron_train.errors import UserError

if TYPE_CHECKING:
    from meditron_train.checkpoint.conversion import Limits, Progress
    from meditron_train.checkpoint.foreign import ForeignOptions
    from meditron_train.checkpoint.workspace import Ranks
    from meditron_train.convert.verify import Comparison

app = typer.Typer(
    help="Convert, verify and inspect checkpoints.", no_args_is_help=True, rich_markup_mode=None
)

_MAX_LISTED = 50
_SIDE = "Hugging Face directory, sharded checkpoint, or a converted directory's manifest.json alone."

Dtype = Annotated[str, typer.Option("--dtype", help="bf16, fp16, fp32, or keep: each tensor's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
MaxRam = Annotated[
    str, typer.Option("--max-ram", help="Memory that may be resident, this program's own included.")
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity, and say so.")
]


@app.command("hf-to-megatron")
def hf_to_megatron_command(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face model directory.")],
    ckpt_dir: Annotated[Path, typer.Argument(metavar="CKPT_DIR", help="Sharded checkpoint to write.")],
    dtype: Dtype = "keep",
    max_ram: MaxRam = "4GiB",
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a Hugging Face model as a sharded checkpoint that any parallel layout loads.

    Interrupted, the same command goes on where it was. Under torchrun or srun the processes share the work.
    """
    from meditron_train.convert.hf_to_megatron import hf_to_megatron

    limits = _limits(max_ram, allow_nonfinite)
    with _ranks() as ranks, _progress("converting", hidden=not _is_first(ranks)) as advance:
        hf_to_megatron(hf_dir, ckpt_dir, dtype=dtype, limits=limits, ranks=ranks, progress=advance)
    if _is_first(ranks):
        _say(f"Wrote {ckpt_dir}. Check it with: meditron-train convert verify {hf_dir} {ckpt_dir}")


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
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest safetensors file.")
    ] = "5GB",
    allow_nonfinite: AllowNonfinite = False,
    tokenizer: Tokenizer = None,
    config: Config = None,
    vocab_size: VocabSize = None,
    rotary: Rotary = "auto",
) -> None:
    """Write a checkpoint as a Hugging Face directory that transformers loads.

    Interrupted, the same command goes on where it was. Under torchrun or srun the processes share the work.
    """
    from meditron_train.checkpoint.export import export_hf
    from meditron_train.checkpoint.foreign import is_foreign_directory
    from meditron_train.convert.foreign_to_hf import foreign_to_hf

    limits, options = (
        _limits(max_ram, allow_nonfinite),
        _foreign_options(tokenizer, config, vocab_size, rotary),
    )
    _require_foreign(ckpt_dir, options)
    is_foreign = is_foreign_directory(ckpt_dir)
    has_tokenizer = True
    with _ranks() as ranks, _progress("converting", hidden=not _is_first(ranks)) as advance:
        arguments: dict[str, Any] = {
            "dtype": dtype, "max_shard_size": max_shard_size, "limits": limits, "ranks": ranks, "progress": advance,
        }  # fmt: skip
        if is_foreign:
            source = foreign_to_hf(ckpt_dir, hf_dir, options or _foreign_defaults(), **arguments)
            has_tokenizer = source.tokenizer is not None
        else:
            export_hf(ckpt_dir, hf_dir, **arguments)
    if _is_first(ranks):
        if not has_tokenizer:
            _say("No tokenizer was given (--tokenizer DIR): copy its files there before the model is used.")
        _say(f"Wrote {hf_dir}. Check it with: meditron-train convert verify {ckpt_dir} {hf_dir}")


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
    """Write a checkpoint as Megatron's per-rank files, for other tools; loading here never needs it."""
    from meditron_train.convert.reshard import reshard

    options = _foreign_options(tokenizer, config, vocab_size, rotary)
    _require_foreign(source, options)
    with _progress("writing") as advance:
        result = reshard(
            source, target, tp=tp, pp=pp, with_optimizer=optimizer, options=options, progress=advance
        )
    state = "weights and optimizer state" if result.with_optimizer else "weights"
    _say(f"Wrote {target}/{result.iteration}: {tp} x {pp} ranks, {state}.")


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
    """Compare two models bit for bit; exit 0 only if they are equal, else 1 and what differs."""
    from meditron_train.convert.verify import verify

    with _progress("comparing", hidden=json_output) as advance:
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
    """
    from meditron_train.convert.inspect import inspect_directory

    with _progress("reading", hidden=json_output) as advance:
        description = inspect_directory(directory, hashes=hashes, progress=advance)
    if json_output:
        _print_json(description)
    else:
        _print_description(description)
    raise typer.Exit(0 if description["intact"] else 1)


def _foreign_defaults() -> ForeignOptions:
    from meditron_train.checkpoint.foreign import ForeignOptions

    return ForeignOptions()


def _foreign_options(
    tokenizer: Path | None, config: Path | None, vocab_size: int | None, rotary: str
) -> ForeignOptions | None:
    """None when the user gave none of them."""
    from meditron_train.checkpoint.foreign import ForeignOptions

    if rotary not in ("auto", "half", "interleaved"):
        raise UserError(f"--rotary is {rotary!r}. Write auto, half or interleaved.")
    options = ForeignOptions(tokenizer, config, vocab_size, rotary)  # type: ignore[arg-type]
    return None if options == ForeignOptions() else options


def _require_foreign(checkpoint: Path, options: ForeignOptions | None) -> None:
    from meditron_train.checkpoint.foreign import is_foreign_directory

    if options is not None and not is_foreign_directory(checkpoint):
        raise UserError(
            f"{checkpoint} is no checkpoint of Megatron-LM or Megatron-LLM: --tokenizer, --config, --vocab-size and "
            "--rotary are for those. Leave them out."
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
        print(difference)
    if len(result.differences) > _MAX_LISTED:
        print(f"… and {len(result.differences) - _MAX_LISTED} more (all of them with --json)")
    if logits := result.logits:
        print(
            f"logits: max |Δ| {logits.max_difference:.3e}, KL {logits.kl_divergence:.3e} nats per token\n"
            f"  A by transformers, B by meditron-train: max |Δ| {logits.ours_max_difference:.3e}, "
            f"KL {logits.ours_kl_divergence:.3e}"
        )
    if result.differences:
        print(
            f"different: {len(result.differences)} differences in {result.num_tensors} tensors, config and tokenizer"
        )
    else:
        cast = f" after the declared cast to {result.cast}" if result.cast else ""
        print(
            f"equal: {result.num_tensors} tensors ({_size(result.num_bytes)}) bit for bit{cast}, config, tokenizer"
        )


def _print_description(description: dict[str, Any]) -> None:
    model = description["model"]
    print(
        f"{description['directory']}: {description['format']}, {description['num_parameters']:,} parameters"
    )
    print(
        f"  model: {model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_heads']} heads "
        f"({model['num_kv_heads']} KV) of {model['head_dim']}, feed-forward {model['intermediate_size']}, "
        f"vocabulary {model['vocab_size']}{', tied' if model['tie_embeddings'] else ''}"
    )
    rope = model["rope"]
    print(
        f"  RoPE: {rope['kind']}, theta {rope['theta']:g}"
        + (f", factor {rope['factor']:g}" * (rope["kind"] != "default"))
    )
    for key in ("step", "tokens", "samples", "layout", "contains", "padded_vocab_size", "versions"):
        if key in description:
            print(f"  {key}: {description[key]}")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in description["dtypes"].items())
    print(f"  tensors: {description['num_tensors']} ({dtypes}), {_size(description['num_bytes'])}")
    width = max((len(tensor["name"]) for tensor in description["tensors"]), default=0)
    for tensor in description["tensors"]:
        print(
            f"    {tensor['name']:{width}}  {tensor['dtype']:9} {tensor['shape']!s:18} {', '.join(tensor['files'])}"
        )
    print("  files:")
    for file in description["files"]:
        print(f"    {file.get('sha256', '-')[:16]:16}  {file['num_bytes']:>14,}  {file['name']}")
    if description["problems"]:
        print("BROKEN:")
        for problem in description["problems"]:
            print(f"  {problem}")
    else:
        print("intact")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _limits(max_ram: str, allow_nonfinite: bool) -> Limits:
    from meditron_train.checkpoint.conversion import Limits
    from meditron_train.checkpoint.hf_write import parse_num_bytes

    return Limits(parse_num_bytes(max_ram), allow_nonfinite)


@contextmanager
def _ranks() -> Iterator[Ranks | None]:
    """The processes that convert together under torchrun or srun; None for one."""
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.launcher.rendezvous import meet

    with meet(detect_launcher()) as ranks:
        yield ranks


def _is_first(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.rank == 0


@contextmanager
def _progress(verb: str, *, hidden: bool = False) -> Iterator[Progress | None]:
    """Bytes, rate and time left on stderr while the block runs; nothing when stderr is not a terminal."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, num_bytes, total: bar.update(
            task, advance=num_bytes, total=total, description=name
        )
