"""A build from its declaration to its published directory: the stages in their order.

scan    shards: which ids are claimed more than once, and one process that decides who keeps them
read    shards: raw files to documents, filters of single documents, benchmark items
exact   one process: abstracts of papers, equal content
sign    units: MinHash signatures
pair    buckets: pairs of near-duplicates
cluster one process: which of them are kept
write   units: split
publish one process: one file per source and split, manifest
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from meditron_train.corpus.declaration import Corpus
from meditron_train.corpus.json_files import read_json, read_json_lines, write_json
from meditron_train.corpus.manifest import FORMAT, locked
from meditron_train.corpus.pipeline.contamination import BenchmarkIndex
from meditron_train.corpus.pipeline.exact import (
    drop_abstracts_of_papers,
    drop_equal_content,
)
from meditron_train.corpus.pipeline.execute import Execution, Stage, run_stage
from meditron_train.corpus.pipeline.fates import Fates
from meditron_train.corpus.pipeline.index import Index
from meditron_train.corpus.pipeline.near import PairBuckets, SignUnits, drop_near_duplicates
from meditron_train.corpus.pipeline.plan import Plan, make_plan, plan_record
from meditron_train.corpus.pipeline.publish import publish
from meditron_train.corpus.pipeline.read import ReadShards, ScanShards, resolve_claims
from meditron_train.corpus.pipeline.store import describe, recorded_problem
from meditron_train.corpus.pipeline.work import WorkDirectory, whole_directory
from meditron_train.corpus.pipeline.write import WriteUnits
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

_MAX_REPORTED_PROBLEMS = 20


def build(
    corpus: Corpus,
    execution: Execution = Execution(),  # noqa: B008
    *,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build a corpus in its output directory.

    An interrupted build of the same declaration and files is continued; a finished one is returned as it is.
    Problems are counted in the manifest and listed in problems.jsonl.

    Args:
        corpus: the declaration.
        execution: where and how wide the stages run.
        strict: the first damage to the input is a UserError (not records that a rule leaves out, such as
            retracted ones).
        overwrite: throw away what another declaration left there.

    Returns:
        The manifest.

    Raises:
        UserError: the output is a file or another corpus, or something is wrong with the input.
    """
    output = corpus.output
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: give a directory")
    output.mkdir(parents=True, exist_ok=True)
    work = WorkDirectory(output / ".build")
    with locked(output):
        BenchmarkIndex(corpus.decontamination)  # a mistake there shows now, not after hours
        plan = make_plan(corpus, work)
        _refuse_problems([describe(problem) for _, problem in plan.problems], strict)
        manifest_path = output / "manifest.json"
        if manifest_path.is_file() and _is_finished(manifest_path, plan, overwrite):
            _log.info("%s is already built from the same files", output)
            shutil.rmtree(work.root)
            if strict:
                _refuse_damage([output / "problems.jsonl"])
            return dict(read_json(manifest_path))
        _begin(plan, work, overwrite)
        if strict:
            finished = (work.shard(shard.number) for shard in plan.shards)
            _refuse_damage(shard / "problems.jsonl" for shard in finished if shard.is_dir())
        manifest = _run(plan, work, execution, strict)
        _report(output / "problems.jsonl", manifest)
        shutil.rmtree(work.root)
    return manifest


def _run(plan: Plan, work: WorkDirectory, execution: Execution, strict: bool) -> dict[str, Any]:
    total_bytes = max(sum(shard.num_bytes for shard in plan.leaders), 1)

    def share_of(path: Callable[[int], Path]) -> Callable[[], float]:
        return lambda: sum(s.num_bytes for s in plan.leaders if path(s.number).exists()) / total_bytes

    def stage(name: str, title: str, step: PipelineStep, pieces: int, **progress: Any) -> None:
        if pieces:
            run_stage(Stage(name, title, [step], pieces, **progress), execution, work)

    shards, units = len(plan.leaders), len(plan.units)
    stage("scan", "scan for ids", ScanShards(plan, work), shards, done_share=share_of(work.claims))
    resolve_claims(plan, work)
    stage("read", "read and filter", ReadShards(plan, work, strict), shards, done_share=share_of(work.shard))
    index = Index(plan, work)
    documents = index.num_documents
    if not work.fates.is_dir():
        fates = Fates.all_kept(documents)
        # Abstracts first: else an equal text that comes before its paper stands for it, and the paper for the abstract.
        if plan.corpus.dedup.full_text:
            drop_abstracts_of_papers(index, fates)
        if plan.corpus.dedup.exact:
            drop_equal_content(index, fates)
        with whole_directory(work.fates) as directory:
            fates.write(directory)
    if not work.clusters.is_dir():
        fates = Fates.load(work.fates).copy()
        near = plan.corpus.dedup.near
        if near.enabled and units:
            _raise_file_limit(units)
            stage("sign", "MinHash signatures", SignUnits(plan, work), units, total_documents=documents)
            done = lambda: len(list(work.pairs.glob("?????"))) / near.buckets  # noqa: E731
            stage("pair", "MinHash buckets", PairBuckets(plan, work), near.buckets, done_share=done)
            drop_near_duplicates(index, fates)
        with whole_directory(work.clusters) as directory:
            fates.write(directory)
    stage("write", "write", WriteUnits(plan, work), units, total_documents=documents)
    return publish(plan, work)


def _refuse_problems(problems: list[str], strict: bool) -> None:
    for number, problem in enumerate(problems):
        if strict:
            raise UserError(problem)
        if number < _MAX_REPORTED_PROBLEMS:
            _log.warning("%s", problem)


def _refuse_damage(files: Iterable[Path]) -> None:
    """Stop at what an earlier build, which was not strict, went past."""
    for path in files:
        for record in read_json_lines(path):
            problem = recorded_problem(record)
            if problem.reason.is_damage:
                raise UserError(describe(problem))


def _report(problems: Path, manifest: dict[str, Any]) -> None:
    count = sum(1 for _ in read_json_lines(problems))
    if count:
        _log.warning("%d problems of the input, with file and position: %s", count, problems)
    for source in manifest["sources"]:
        if skipped := source["not_selected"]:
            values = "; ".join(f"{label} ({count})" for label, count in skipped.items())
            _log.warning(
                "records of the files of %r that no source selects: %d, which have %s",
                source["name"],
                sum(skipped.values()),
                values,
            )


def _is_finished(manifest: Path, plan: Plan, overwrite: bool) -> bool:
    """Whether the corpus that lies there is this one.

    Raises:
        UserError: it is another.
    """
    found = read_json(manifest)
    if found.get("format") == FORMAT and found.get("fingerprint") == plan.fingerprint:
        return True
    if not overwrite:
        raise UserError(
            f"{manifest.parent} holds a corpus of another declaration or other files: use --overwrite to replace "
            "it, or another output"
        )
    return False


def _begin(plan: Plan, work: WorkDirectory, overwrite: bool) -> None:
    """Find out whether there is something to continue, and clear away what is not."""
    if work.plan.is_file():
        if read_json(work.plan)["fingerprint"] == plan.fingerprint:
            _log.info("continuing the interrupted build in %s", work.root)
            return
        if not overwrite:
            raise UserError(
                f"{work.root} holds an interrupted build of another declaration or other files: use --overwrite to "
                "throw it away, or another output"
            )
        for path in work.root.iterdir():
            if path.name != "shards":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = work.root.parent
    (output / "manifest.json").unlink(missing_ok=True)
    for name in ("data.yaml", "phases.yaml"):
        (output / name).unlink(missing_ok=True)
    for name in ("documents", "manifest", "tokenized", "tokenizer", "card"):
        shutil.rmtree(output / name, ignore_errors=True)
    write_json(work.plan, plan_record(plan))


def _raise_file_limit(files: int) -> None:
    """datatrove's merge of signatures opens a file for each unit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + 256
    if soft < wanted and (hard == resource.RLIM_INFINITY or hard >= wanted):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
