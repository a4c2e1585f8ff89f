"""`meditron-train data`: tokenize text, look at datasets, trace what a step trained on."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from meditron_train.errors import UserError

app = typer.Typer(help="Tokenize text, look at datasets, trace what a step trained on.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class TextDocument(enum.StrEnum):
    """What a document of a text file is."""

    line = "line"
    file = "file"


class ChatTemplateName(enum.StrEnum):
    """By which template conversations are rendered."""

    chatml = "chatml"
    tokenizer = "tokenizer"


@app.command()
def tokenize(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".jsonl, .txt (also .gz, .zst) or .parquet.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Directory of a Hugging Face model or tokenizer.")],
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
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each document with BOS; default: as the tokenizer does.",
            show_default=False,
        ),
    ] = None,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="End each document with EOS.")] = True,
    txt: Annotated[TextDocument, typer.Option(help="What a document of a .txt file is.")] = TextDocument.line,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Rows are conversations: messages, or question, answer and system."),
    ] = False,
    chat_template: Annotated[
        ChatTemplateName, typer.Option(help="ChatML, or the template that the tokenizer brings (--chat).")
    ] = ChatTemplateName.chatml,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line instead of skipping it.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing dataset or interrupted run.")] = False,
) -> None:
    """Turn text files into one dataset. An interrupted run is continued by the same command.

    \b
    Examples:
      meditron-train data tokenize pubmed.jsonl.gz --tokenizer Llama-2-7b-hf \\
          --output data/pubmed --workers 16
      meditron-train data tokenize notes/*.txt --txt file \\
          --tokenizer Llama-2-7b-hf --output data/notes
      meditron-train data tokenize chat.jsonl --chat \\
          --tokenizer Llama-2-7b-hf --output data/chat
    """
    from meditron_train.config.chat import CHATML_TOKENS
    from meditron_train.data.tokenizing.encode import TokenizeOptions
    from meditron_train.data.tokenizing.tokenize import tokenize as run

    tokens = tuple(special_tokens.replace(",", " ").split())
    if chat and chat_template == ChatTemplateName.chatml:
        tokens += tuple(token for token in CHATML_TOKENS if token not in tokens)
    options = TokenizeOptions(
        tokenizer=str(tokenizer),
        special_tokens=tokens,
        text_key=text_key,
        id_key=id_key,
        bos=bos,
        eos=eos,
        txt=txt.value,
        chat=chat_template.value if chat else None,
    )
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    meta = run(
        files, output, options, workers=num_workers, strict=strict, overwrite=overwrite, show_progress=True
    )
    typer.echo(
        f"{output}: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['dtype']}"
        f"{', {:,} of them answers'.format(meta['chat']['loss_tokens']) if chat else ''}); "
        f"{meta['empty_documents']:,} empty documents and {meta['bad_lines']:,} bad lines left out"
    )


@app.command()
def conversations(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A benchmark's training file.")],
    task: Annotated[str, typer.Option(help="Whose format it has: a name of `evaluate --tasks list`.")],
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="For `data tokenize --chat`.")],
    cot: Annotated[
        bool, typer.Option("--cot", help="Answers explain themselves first, as --mode cot asks for.")
    ] = False,
) -> None:
    """Turn a benchmark's training questions into conversations, put as `evaluate --chat` puts them.

    \b
    Examples:
      meditron-train data conversations train.jsonl --task medqa5 \\
          --output chat.jsonl
    """
    from meditron_train.evaluate.conversations import write_conversations
    from meditron_train.tasks.catalogue import find_benchmarks

    benchmarks = find_benchmarks(task)
    if len(benchmarks) > 1:
        raise UserError(f"--task {task} names {len(benchmarks)} tasks; a file is of one")
    written = write_conversations(file, benchmarks[0], output, with_reasons=cot)
    left_out = f"; {written.num_unexplained:,} rows without an explanation left out" if cot else ""
    typer.echo(f"{output}: {written.num_conversations:,} conversations{left_out}")


@app.command()
def info(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="The dataset, without .bin or .idx.")],
    check: Annotated[bool, typer.Option(help="Compute the hash again and compare it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Documents, tokens, dtype, hash and document lengths of a dataset.

    \b
    Examples:
      meditron-train data info data/pubmed
      meditron-train data info data/pubmed --check --json
    """
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
        tokenizer, chat = found["meta"]["tokenizer"], found["meta"].get("chat")
        if chat:
            lines.append(f"chat       template {chat['template']}, {chat['loss_tokens']:,} tokens of answers")
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
    """Which documents a step trained on: source, number, id, and which of their tokens.

    Of a corpus built here also its license and URL.

    \b
    Examples:
      meditron-train data trace runs/llama2-7b --step 100
    """
    from meditron_train.flows.corpus.runs import trace_with_corpus

    found = trace_with_corpus(run, step)
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
            f"{'-' if row['id'] is None else row['id']}{_origin(row.get('corpus'))}"
        )


def _origin(corpus: dict[str, Any] | None) -> str:
    return "" if corpus is None else f"  {corpus['license']}  {corpus['url'] or '-'}"
