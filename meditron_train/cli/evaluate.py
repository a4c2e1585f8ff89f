"""`meditron-train evaluate`: benchmarks on a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from meditron_train.errors import UserError

_SEEDS = "1234"
_TABLES = (".md", ".html", ".csv")


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Hugging Face directory, sharded checkpoint or run directory."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How the ranks share the model.", metavar="[parallel.field=value]..."),
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Names, separated by commas, or list.")] = "list",
    data: Annotated[Path, typer.Option("--data", help="Directory of the benchmarks' files.")] = Path(
        "benchmarks-data"
    ),
    mode: Annotated[str, typer.Option("--mode", help="likelihood, cot or sc-cot.")] = "likelihood",
    shots: Annotated[int, typer.Option("--shots", min=0, help="Examples shown before each question.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask by the chat template of the model's tokenizer.")
    ] = False,
    seeds: Annotated[
        str,
        typer.Option("--seeds", help="Seeds of examples and sampling, separated by commas; a run for each."),
    ] = _SEEDS,
    branches: Annotated[int, typer.Option("--branches", min=1, help="Reasonings per question (sc-cot).")] = 5,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of sampling (sc-cot).")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 512,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N items.")] = None,
    runner: Annotated[
        str,
        typer.Option(
            "--runner",
            help="transformers, parallel (our own model, on any number of ranks) or vllm. auto: parallel on several "
            "ranks, else transformers.",
        ),
    ] = "auto",
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Start this many ranks on this machine.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE.json", help="Scores and every answer; default: ./evaluation-NAME.json."
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="FILE.json", help="Results of earlier evaluations, for the table."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Write the table as .md, .html or .csv.")
    ] = None,
) -> None:
    """Score a model on medical benchmarks from local files, and show it beside published models.

    Without MODEL, --compare FILE… shows earlier results. An answer that cannot be parsed counts as wrong and is counted
    apart; every prompt, log-likelihood and generated text is kept in --output, which is written after each task. Of a
    run, its newest checkpoint is scored, or the export of it (RUN_DIR/hf).

    \b
    Examples:
      meditron-train evaluate --tasks list
      meditron-train evaluate models/Llama-2-7b-hf --tasks medqa4,medmcqa \\
          --output before.json
      meditron-train evaluate runs/llama2-7b --tasks medqa4,medmcqa \\
          --compare before.json --table table.md
      meditron-train evaluate runs/llama2-70b --tasks medqa4 \\
          --processes 8 parallel.tensor=4 parallel.pipeline=2
    """
    if tasks == "list" and model is None and not compare:
        _print_tasks()
        return
    results = _check_files(output, table, compare or ())
    if model is not None:
        protocol = _protocol(mode, shots, seeds, branches, temperature, max_new_tokens, chat)
        if processes is not None:
            raise typer.Exit(_run_ranks(processes))
        result = _evaluate(
            model,
            output,
            tasks=tasks,
            data=data,
            protocol=protocol,
            runner=runner,
            overrides=tuple(overrides or ()),
            batch_size=batch_size,
            device=device,
            limit=limit,
        )
        if result is None:
            return
        results.insert(0, result)
    _show(results, table)


def _check_files(output: Path | None, table: Path | None, compare: Sequence[Path]) -> list[dict[str, Any]]:
    """Refuse what cannot be read or written; returns the results of --compare."""
    for option, path in (("--output", output), ("--table", table)):
        if path is not None:
            _prepare(option, path, compare)
    if table is not None and table.suffix not in _TABLES:
        raise UserError(f"--table {table}: write a name that ends in .md, .html or .csv")
    if not compare:
        return []
    from meditron_train.evaluate.harness.compare import read_result

    return [read_result(path) for path in compare]


def _prepare(option: str, path: Path, inputs: Sequence[Path]) -> None:
    """Find out now, not after hours, that a file cannot be written."""
    if any(path.resolve() == other.resolve() for other in inputs):
        raise UserError(
            f"{option} {path} would take the place of a file that --compare reads: give another one"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: its directory cannot be made: {error}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: name a file in a directory of yours")


def _protocol(
    mode: str,
    shots: int,
    seeds: str,
    branches: int,
    temperature: float,
    max_new_tokens: int,
    chat: bool,
) -> Any:
    from meditron_train.evaluate.harness.lm_task import Protocol

    if mode not in ("likelihood", "cot", "sc-cot"):
        raise UserError(f"--mode is {mode!r}; write likelihood, cot or sc-cot")
    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise UserError(
            f"--seeds is {seeds!r}; write numbers separated by commas, such as 1234,432,32"
        ) from None
    consistent = mode == "sc-cot"
    return Protocol(
        mode,  # type: ignore[arg-type]
        shots,
        numbers,
        branches if consistent else 1,
        temperature if consistent else 0.0,
        max_new_tokens,
        chat,
    )


def _evaluate(model: Path, output: Path | None, **fields: Any) -> dict[str, Any] | None:
    """The result of a `Request` of these and other fields; None on every rank but the first, which reports."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # the harness's bar: a line a minute in a log
    from meditron_train.flows.evaluate import Request, default_output, evaluate_model
    from meditron_train.launcher.environment import detect_launcher

    launch = detect_launcher()
    if output is None:
        output = default_output(model)
        _prepare("--output", output, ())
        if launch.rank == 0:
            print(f"scores and every answer go to {output}", file=sys.stderr)
    result = evaluate_model(Request(model=model, output=output, **fields), launch)
    return result if launch.rank == 0 else None


def _run_ranks(num_ranks: int) -> int:
    """This command by so many ranks; returns their exit code."""
    from meditron_train.launcher.local_ranks import run_ranks

    return run_ranks([sys.executable, "-m", "meditron_train", *_without_processes(sys.argv[1:])], num_ranks)


def _without_processes(words: Sequence[str]) -> list[str]:
    """The command line of a rank."""
    kept, is_value = [], False
    for word in words:
        if not is_value and word.partition("=")[0] != "--processes":
            kept.append(word)
        is_value = not is_value and word == "--processes"
    return kept


def _show(results: list[dict[str, Any]], table: Path | None) -> None:
    from meditron_train.evaluate.harness.compare import compare, compare_pair

    for result in results:
        for score in result["scores"]:
            print(_line(result["model"], score))
    compared = compare(results)
    print("\n" + compared.markdown(), end="")
    if table is not None:
        from meditron_train.files import replace_text

        texts = {".md": compared.markdown, ".html": compared.html, ".csv": compared.csv}
        replace_text(table, texts[table.suffix]())
    if len(results) == 2:
        for name, test in compare_pair(*results).items():
            if test is None:
                print(f"{name}: no paired test, as the two results are of different questions")
                continue
            print(
                f"{name}: {test.only_first} items only the first model answers, {test.only_second} only the second, "
                f"p = {test.p_value:.3g}"
            )


def _line(model: str, score: dict[str, Any]) -> str:
    if score["accuracy"] is None:
        cut = f" ({score['num_cut']} prompts cut)" if score.get("num_cut") else ""
        return f"{model}  {score['benchmark']}: {score['num_items']} answers generated, not scored{cut}"
    low, high = score["interval"]
    by_length = score.get("accuracy_by_length")  # not in results of earlier versions
    norm = f", acc_norm {100 * by_length:.1f}" if by_length is not None else ""
    spread = f", sd over seeds {100 * score['spread']:.1f}" if len(score["protocol"]["seeds"]) > 1 else ""
    unparsed = f", {score['num_unparsed']} unparsed" if score["num_unparsed"] else ""
    ties = f", {score['num_ties']} ties" if score["num_ties"] else ""
    cut = f", {score['num_cut']} prompts cut" if score.get("num_cut") else ""
    return (
        f"{model}  {score['benchmark']}: {100 * score['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of "
        f"{score['num_items']} (chance {100 * score['chance']:.1f}{norm}{spread}{unparsed}{ties}{cut})"
    )


def _print_tasks() -> None:
    from meditron_train.tasks.catalogue import BENCHMARKS

    for benchmark in BENCHMARKS.values():
        print(f"{benchmark.name:16} {benchmark.title}; file {benchmark.file_name}")
