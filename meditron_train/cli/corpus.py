"""`meditron-train corpus`: build a corpus from its sources, describe it, check it, take documents out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from meditron_train.errors import UserError

app = typer.Typer(
    help="Build a corpus from its sources, describe it, check it, take documents out.", no_args_is_help=True
)

CorpusArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a finished corpus.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes; default: the CPUs of this process.", show_default=False)
]
RunsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--runs",
        metavar="RUN",
        help="Run directories, or directories of them; default: runs.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class Executor(StrEnum):
    """datatrove's executors."""

    local = "local"
    slurm = "slurm"


def _require_extra() -> None:
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("this needs further packages: pip install 'meditron-train[corpus]'")


def _num_workers(workers: int | None) -> int:
    return len(os.sched_getaffinity(0)) if workers is None else workers


@app.command()
def build(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Such as configs/corpus/gap-replay.yaml.")],
    executor: Annotated[Executor, typer.Option(help="Where the stages run.")] = Executor.local,
    workers: WorkersOption = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks of each stage; default: by workers.", show_default=False)
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Stop at the first damaged record or file of the input.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what another build left in the output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read, filter, deduplicate, decontaminate, write, tokenize. An interrupted build is continued.

    \b
    Examples:
      meditron-train corpus build configs/corpus/gap-replay.yaml --workers 16
    """
    _require_extra()
    from meditron_train.corpus.declaration import load_corpus
    from meditron_train.corpus.pipeline.build import build as run
    from meditron_train.corpus.pipeline.execute import Execution
    from meditron_train.flows.corpus.build import build_corpus

    corpus = load_corpus(config)
    num_workers = _num_workers(workers)
    execution = Execution(executor.value, num_workers, tasks, corpus.slurm, show_progress=True)
    manifest = build_corpus(
        corpus,
        lambda: run(corpus, execution, strict=strict, overwrite=overwrite),
        workers=num_workers,
        show_progress=True,
    )
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    for source in manifest["sources"]:
        typer.echo(_describe(source))
    typer.echo(f"{corpus.output}: finished; `meditron-train corpus card {corpus.output}` describes it")


def _describe(source: dict[str, Any]) -> str:
    if not source["is_given"]:
        return f"{source['name']}: declared without a path"
    kept = sum(counts["documents"] for counts in source["splits"].values())
    tokens = [counts["tokens"] for counts in source["splits"].values() if "tokens" in counts]
    parts = [f"{source['read']['documents']:,} documents read", f"{kept:,} kept"]
    parts += [f"{sum(tokens):,} tokens"] if tokens else []
    if source["not_selected"]:
        parts.append(f"{sum(source['not_selected'].values()):,} records that no source selects")
    parts += [f"{count:,} {rule}" for rule, count in source["dropped"].items()]
    problems = sum(source["problems"].values())
    return f"{source['name']}: {', '.join(parts)}" + (f"; {problems:,} problems" if problems else "")


@app.command()
def card(
    directory: CorpusArgument,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; default: DIR/card.", show_default=False)
    ] = None,
) -> None:
    """Describe a corpus: Markdown, HTML, a Hugging Face dataset card, Croissant.

    \b
    Examples:
      meditron-train corpus card corpora/gap-replay --output card
    """
    _require_extra()
    from meditron_train.corpus.card.write import write_cards

    for path in write_cards(directory, output or directory / "card"):
        typer.echo(str(path))


@app.command()
def check(
    directory: CorpusArgument,
    retractions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Newer MEDLINE files (.xml, .xml.gz), PMC metadata (.json, .jsonl), or directories.",
        ),
    ] = None,
    benchmark: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Further benchmarks (JSONL) to look for.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="Field of the benchmark's text; default: question.")
    ] = None,
    runs: RunsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hashes, documents retracted since, benchmark items; and the steps that saw them. Exit code 1 if any is found.

    \b
    Examples:
      meditron-train corpus check corpora/gap-replay --runs runs
      meditron-train corpus check corpora/gap-replay \\
          --retractions updates.xml.gz --benchmark medqa.jsonl
    """
    _require_extra()
    from meditron_train.corpus.declaration import Benchmark
    from meditron_train.flows.corpus.check import check_corpus
    from meditron_train.flows.corpus.runs import find_runs

    benchmarks = [
        Benchmark(name=_name_of(path), path=path, keys=tuple(key or ("question",)))
        for path in benchmark or ()
    ]
    report = check_corpus(
        directory,
        retractions=retractions or (),
        benchmarks=benchmarks,
        runs=find_runs(runs or [Path("runs")]),
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print_check(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _name_of(path: Path) -> str:
    """What a file is called, in the characters of a name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.split(".")[0]).lstrip("-_") or "benchmark"


def _print_check(report: dict[str, Any]) -> None:
    for changed in report["changed_files"]:
        typer.echo(f"{changed['file']}: {changed['problem']}")
    for benchmark in report["recorded_contamination"]:
        typer.echo(
            f"benchmark {benchmark['name']}: {benchmark['touched']} of {benchmark['items']} items were found in "
            f"{benchmark['documents']} documents, which the build {_done(benchmark['action'])}"
        )
    for hit in report["contamination"]:
        typer.echo(
            f"{hit['source']} {hit['id']}: contains {hit['benchmark']} {hit['item']} (rule {hit['rule']})"
        )
    for document in report["retracted"]:
        typer.echo(f"{document['source']} {document['id']}: {document['why']}")
    for problem in report["problems"]:
        where = ", ".join(filter(None, (problem["file"], problem["position"])))
        typer.echo(f"{where}: {problem['reason']} ({problem['detail']}); get this file again")
    _print_runs(report["runs"])
    if report["ok"]:
        typer.echo(f"{report['corpus']}: nothing found")


def _done(action: str) -> str:
    return {"remove": "removed", "flag": "kept and flagged"}[action]


def _print_runs(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        if "unknown" in run:
            typer.echo(f"{run['run']}: cannot tell what it saw ({run['unknown']})")
            continue
        for document in run["documents"]:
            steps = document["steps"]
            shown = ", ".join(map(str, steps[:10])) + (
                f" and {len(steps) - 10} more" if len(steps) > 10 else ""
            )
            typer.echo(
                f"{run['run']}: {document['source']} {document['id']} "
                + (f"seen in step {shown}" if steps else "not seen")
            )


@app.command()
def remove(
    directory: CorpusArgument,
    ids: Annotated[Path, typer.Option(metavar="FILE", help="One id per line, or SOURCE<tab>ID.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The new corpus; default: DIR-without-NAME_OF_FILE.", show_default=False),
    ] = None,
    runs: RunsOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the corpus without some documents; say which steps of which runs saw them.

    \b
    Examples:
      meditron-train corpus remove corpora/gap-replay --ids withdrawn.txt
    """
    _require_extra()
    from meditron_train.flows.corpus.remove import remove_documents
    from meditron_train.flows.corpus.runs import find_runs

    target = output or directory.with_name(f"{directory.resolve().name}-without-{ids.stem}")
    report = remove_documents(
        directory,
        ids,
        target,
        runs=find_runs(runs or [Path("runs")]),
        workers=_num_workers(workers),
        show_progress=True,
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"{target}: the corpus without {len(report['removed'])} documents")
    for document in report["removed"]:
        for other in document.get("stood_for", ()):
            name = f"{document['source']} {document['id']}"
            typer.echo(f"{name}: removed, as it stood for {other['source']} {other['id']}")
    if report["not_found"]:
        typer.echo(f"not in the corpus: {', '.join(report['not_found'])}")
    _print_runs(report["runs"])


@app.command()
def tokenizer(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".jsonl or .txt (also .gz, .zst), or .parquet.")
    ],
    vocab_size: Annotated[int, typer.Option(help="Pieces, with the 256 bytes and <unk>, <s>, </s>.")],
    output: Annotated[Path, typer.Option(help="Directory for tokenizer.model.")],
    text_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
) -> None:
    """Train a sentencepiece tokenizer like Llama's on your own text.

    \b
    Examples:
      meditron-train corpus tokenizer text/*.jsonl --vocab-size 32000 \\
          --output tokenizers/ours
    """
    from meditron_train.data.tokenizing.train import train_tokenizer

    train_tokenizer(files, output, vocab_size=vocab_size, text_key=text_key)
    typer.echo(str(output / "tokenizer.model"))
