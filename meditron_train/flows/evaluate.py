"""Benchmarks on a model, by one process or by many ranks together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY
from meditron_train.checkpoint.manifest import MANIFEST_NAME, read_manifest
from meditron_train.config.load import load_overrides
from meditron_train.config.section import Section
from meditron_train.config.training import ParallelSection
from meditron_train.errors import UserError
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.run import Score, check_model, read_questions, run_benchmark
from meditron_train.evaluate.harness.runners import open_parallel_runner, open_runner, require_harness
from meditron_train.evaluate.language_model import as_hf_directory, check_is_model, choose_device
from meditron_train.files import replace_text, sha256_file
from meditron_train.flows.run_model import model_of_run
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.parallel import destroy
from meditron_train.tasks.catalogue import find_benchmarks


class _Settings(Section):
    """What may be written after MODEL."""

    parallel: ParallelSection = ParallelSection()


@dataclass(frozen=True)
class Request:
    """What is evaluated, and how the model is run.

    Attributes:
        model: Hugging Face directory, sharded checkpoint, or directory of a run.
        tasks: names, separated by commas.
        data: directory of the benchmarks' files.
        runner: auto, transformers, parallel or vllm. auto: parallel on several ranks, transformers alone.
        overrides: `parallel.field=value`.
        output: the file for scores and answers.
        limit: number of items; None: all.
        device: auto, cpu or cuda.
    """

    model: Path
    tasks: str
    data: Path
    protocol: Protocol
    runner: str
    overrides: Sequence[str]
    batch_size: int
    device: str
    output: Path
    limit: int | None = None


def evaluate_model(request: Request, launch: LaunchEnvironment) -> dict[str, Any]:
    """Scores and answers, the same on every rank. Rank 0 writes them to the output after each benchmark.

    Raises:
        UserError: a task, a file, the model or the layout is wrong. Only what the model itself lacks is found after it
            was opened.
    """
    benchmarks, device = find_benchmarks(request.tasks), choose_device(request.device)
    require_harness()
    parallel = load_overrides(request.overrides, _Settings).parallel
    runner = request.runner
    if runner == "auto":
        runner = "parallel" if launch.world_size > 1 or request.overrides else "transformers"
    if runner != "parallel" and (launch.world_size > 1 or request.overrides):
        raise UserError(
            f"--runner {runner} runs alone: {launch.world_size} processes and parallel.field=value are for "
            "--runner parallel"
        )
    directory = model_of_run(request.model)
    check_is_model(directory)
    asked = [
        read_questions(benchmark, request.data, request.protocol, limit=request.limit)
        for benchmark in benchmarks
    ]
    dtype = "bfloat16" if device == "cuda" else "float32"
    about: dict[str, Any] = {
        "model": str(request.model),
        "checkpoint": _identity(directory),
        "protocol": asdict(request.protocol),
        "limit": request.limit,
        "runner": runner,
        "dtype": dtype,
    }
    result, scores = about, list[Score]()
    settings = {
        "device": device,
        "batch_size": request.batch_size,
        "dtype": dtype,
        "chat": request.protocol.chat,
    }
    with _opened(directory, runner, parallel, launch, settings) as lm:
        for questions in asked:
            check_model(lm, questions)
        for questions in asked:
            scores.append(run_benchmark(lm, questions))
            result = {
                **about,
                "scores": [score.summary() for score in scores],
                "answers": {
                    score.benchmark: [asdict(answer) for answer in score.answers] for score in scores
                },
            }
            if launch.rank == 0:
                replace_text(request.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def default_output(model: Path) -> Path:
    """A file of this name that is not there yet, in the working directory."""
    directory = model.resolve()
    name = directory.parent.name if directory.name in (HF_SUBDIRECTORY, "adapter") else directory.name
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (Path(f"evaluation-{name}{number}.json") for number in numbers)
    return next(path for path in paths if not path.exists())


def _identity(directory: Path) -> dict[str, Any]:
    """Which model it is, wherever it lies: hashes of its manifest, and of its source's, where it has one."""
    manifest = directory / MANIFEST_NAME
    source = (read_manifest(directory) or {}).get("source")
    return {
        "name": directory.resolve().name,
        "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
        "source_manifest_sha256": source.get("manifest_sha256") if isinstance(source, dict) else None,
    }


@contextmanager
def _opened(
    directory: Path,
    runner: str,
    parallel: ParallelSection,
    launch: LaunchEnvironment,
    settings: dict[str, Any],
) -> Iterator[Any]:
    """The lm_eval `LM` of a runner."""
    if runner == "parallel":
        yield open_parallel_runner(directory, launch, parallel, **settings)
        destroy()  # not after an error: it may wait for what a failed peer never sends
    else:
        with as_hf_directory(directory) as hf_directory:
            yield open_runner(runner, hf_directory, **settings)
