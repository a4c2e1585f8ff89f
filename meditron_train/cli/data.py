"""`meditron-train data`: tokenize text, look at datasets, trace what a step trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Tokenize text, look at datasets, trace what a step trained on.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def tokenize(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".jsonl, .jsonl.gz, .jsonl.zst or .parquet.")
    ],
    tokenizer: Annotated[
        Path, typer.Option(help="Directory with tokenizer.model (sentencepiece) or tokenizer.json.")
    ],
    output: Annotated[  # text: a Path would lose the slash at the end
        str, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx, PREFIX.meta.json.")
    ],
    text_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    id_key: Annotated[str, typer.Option(help="Key or column of the id that `data trace` shows.")] = "id",
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: the CPUs of this process.", show_default=False)
    ] = None,
    special_tokens: Annotated[
        str, typer.Option(help="Tokens to add to the vocabulary, separated by commas or spaces.")
    ] = "",
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Begin each document with BOS.")] = True,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="End each document with EOS.")] = True,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line instead of skipping it.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing dataset or interrupted run.")] = False,
) -> None:
    """Turn text files into one dataset. An interrupted run is continued by the same command."""
    from meditron_train.data.encode import TokenizeOptions
    from meditron_train.data.tokenize import tokenize as run

    options = TokenizeOptions(
        tokenizer=str(tokenizer),
        special_tokens=tuple(special_tokens.replace(",", " ").split()),
        text_key=text_key,
        id_key=id_key,
        bos=bos,
        eos=eos,
    )
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    meta = run(
        files, output, options, workers=num_workers, strict=strict, overwrite=overwrite, show_progress=True
    )
    typer.echo(
        f"{output}: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['dtype']}); "
        f"{meta['empty_documents']:,} empty documents and {meta['bad_lines']:,} bad lines left out"
    )


@app.command()
def info(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="The dataset, without .bin or .idx.")],
    check: Annotated[bool, typer.Option(help="Compute the hash again and compare it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Documents, tokens, dtype, hash and document lengths of a dataset."""
    from meditron_train.data.info import dataset_info

    found = dataset_info(prefix, check=check)
    typer.echo(json.dumps(found, indent=1) if as_json else _describe(found))


def _describe(found: dict[str, Any]) -> str:
    lines = [
        f"documents  {found['documents']:,}",
        f"tokens     {found['tokens']:,}",
        f"dtype      {found['dtype']} ({found['num_bytes']:,} bytes)",
        f"sha256     {found['sha256']}",
    ]
    if found["document_length"]:
        lengths = (f"{name} {value:,.0f}" for name, value in found["document_length"].items())
        lines.append(f"lengths    {', '.join(lengths)}")
    if found["meta"]:
        tokenizer = found["meta"]["tokenizer"]
        lines.append(f"tokenizer  {tokenizer['directory']} (vocabulary {tokenizer['vocab_size']:,})")
        lines += [
            f"source     {source['path']}: {source['documents']:,} documents, {source['tokens']:,} tokens"
            for source in found["meta"]["sources"]
        ]
    return "\n".join(lines)


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")],
    step: Annotated[int, typer.Option(help="Step, from 1.")],
    as_json: JsonOption = False,
) -> None:
    """Which documents a step trained on: source, number, id, and which of their tokens."""
    from meditron_train.data.trace import trace_step

    found = trace_step(run, step)
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    first, last = found["first_sample"], found["first_sample"] + found["num_samples"] - 1
    typer.echo(f"step {step}: samples {first} to {last}")
    typer.echo(f"{'sample':>10}  {'source':<20} {'document':>12} {'start':>10} {'length':>8}  id")
    for row in found["segments"]:
        typer.echo(
            f"{row['sample']:>10}  {row['source']:<20} {row['document']:>12} {row['start']:>10} "
            f"{row['length']:>8}  "
            f"{'-' if row['id'] is None else row['id']}"
        )
