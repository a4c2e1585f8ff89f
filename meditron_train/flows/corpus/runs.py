"""What training runs have seen of a corpus: from a step to its documents, and from documents to the steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.config.load import load_config
from meditron_train.corpus.manifest import Dataset, dataset_of_prefix
from meditron_train.data.index_file import bin_path, find_prefix
from meditron_train.data.trace import last_provenance, steps_with, trace_step
from meditron_train.errors import UserError


@dataclass(frozen=True)
class Found:
    """A document of a corpus, by its place."""

    dataset: Dataset
    number: int
    row: dict[str, Any]
    why: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.row["source"], self.row["id"]


def trace_with_corpus(run_dir: Path | str, step: int) -> dict[str, Any]:
    """`trace_step`, with the corpus's id, source, license and URL in each segment whose data comes from a corpus.

    Raises:
        UserError: as `trace_step`, and when corpus and tokenized data are not of the same build.
    """
    traced = trace_step(run_dir, step)
    datasets, _ = _datasets_of_run(Path(run_dir))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for segment in traced["segments"]:
        dataset = datasets.get(segment["source"])
        if dataset is None:
            continue
        place = (segment["source"], segment["document"])
        if place not in rows:
            rows[place] = dataset.row(segment["document"])
        row = rows[place]
        if segment["id"] is not None and segment["id"] != row["id"]:
            raise UserError(
                f"{dataset.manifest}, row {segment['document']} is of {row['id']!r}, but the tokenized data says "
                f"{segment['id']!r}: they are not of the same build"
            )
        segment["id"] = row["id"]
        segment["corpus"] = {"source": row["source"], "license": row["license"], "url": row["url"]}
    return traced


def _datasets_of_run(run_dir: Path) -> tuple[dict[str, Dataset], list[Path]]:
    """The datasets of a corpus by the name of their source in the run, for those training sources that come from one;
    and the paths of which that cannot be told, as nothing is there."""
    config = load_config(run_dir / "config.yaml")
    working_directory = last_provenance(run_dir).get("working_directory")
    datasets, missing = {}, []
    for source in config.data.train:
        found = find_prefix(source.path, working_directory)
        prefix = source.path if found is None else found
        real = bin_path(prefix).resolve().with_suffix("")  # where a link leads
        dataset = dataset_of_prefix(prefix) or dataset_of_prefix(real)
        if dataset is not None:
            datasets[source.name] = dataset
        elif found is None:
            missing.append(source.path)
    return datasets, missing


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Run directories among and directly below the places."""
    found = []
    for place in places:
        candidates = (
            [place, *sorted(path for path in place.glob("*") if path.is_dir())] if place.is_dir() else []
        )
        found += [path for path in candidates if (path / "config.yaml").is_file()]
    return found


def who_saw(documents: list[Found], runs: Iterable[Path]) -> list[dict[str, Any]]:
    """For each run that trained on the corpus: the steps that saw the documents, or why that is unknown."""
    reports = []
    for run in runs:
        try:
            report = _seen_by(documents, run)
        except UserError as error:
            report = {"run": str(run), "unknown": str(error)}
        if report is not None:
            reports.append(report)
    return reports


def _seen_by(documents: list[Found], run: Path) -> dict[str, Any] | None:
    """None for a run that does not use the datasets of the documents.

    Raises:
        UserError: that cannot be told, as its data is not there.
    """
    datasets, missing = _datasets_of_run(run)
    by_manifest = {dataset.manifest.resolve(): name for name, dataset in datasets.items()}
    wanted: dict[str, dict[int, Found]] = {}
    for document in documents:
        name = by_manifest.get(document.dataset.manifest.resolve())
        if name is not None:
            wanted.setdefault(name, {})[document.number] = document
    if missing:
        raise UserError(
            f"its data {', '.join(map(str, missing))} is neither here nor where the run was started"
        )
    if not wanted:
        return None
    steps = steps_with(run, {name: set(numbers) for name, numbers in wanted.items()})
    return {
        "run": str(run),
        "documents": [
            {
                "id": document.row["id"],
                "source": document.row["source"],
                "steps": steps.get(name, {}).get(number, []),
            }
            for name, numbers in wanted.items()
            for number, document in sorted(numbers.items())
        ],
    }
