"""`data trace`: which documents a step of a run trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from meditron_train.config.data import DataSection
from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.data.conversations import answers_among
from meditron_train.data.index_file import find_prefix
from meditron_train.data.meta import ids_path
from meditron_train.data.packed import PackedDataset, Segment, build_train_dataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.sources import Source, vocabulary
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)


def trace_step(run_dir: Path | str, step: int) -> dict[str, Any]:
    """The samples of a step (from 1), rebuilt from RUN/config.yaml and the data.

    Relative paths that are not in the working directory are looked up in that of the run. Without
    RUN/provenance.jsonl nothing can be compared, which is logged and recorded in data_verified.

    Returns:
        step, first_sample, num_samples, data_fingerprint, data_verified and segments: rows with sample,
        source (its name), document (its number in the dataset), id (from the tokenized file, or None), start
        and length in tokens, and of a conversation answer_tokens.

    Raises:
        UserError: the data is not what the run recorded in RUN/provenance.jsonl.
    """
    config = _config_of(run_dir)
    if not 1 <= step <= config.train.steps:
        raise UserError(f"step {step} is not one of this run: it has the steps 1 to {config.train.steps}")
    schedule = BatchSchedule.of(config.train)
    dataset, verified = _open_data(config, schedule, Path(run_dir))
    first, num_samples = schedule.samples_before(step), schedule.batch_size(step)
    samples = range(first, first + num_samples)
    found = [(number, segment) for number in samples for segment in dataset.segments(number)]
    ids = []
    for number, source in enumerate(dataset.sources):
        documents = {segment.document for _, segment in found if segment.source == number}
        ids.append(read_ids(source.dataset.prefix, documents))
    return {
        "run": str(run_dir),
        "step": step,
        "first_sample": first,
        "num_samples": num_samples,
        "data_fingerprint": dataset.fingerprint,
        "data_verified": verified,
        "segments": [
            {
                "sample": number,
                "source": dataset.source_names[segment.source],
                "document": segment.document,
                "id": ids[segment.source].get(segment.document),
                "start": segment.start,
                "length": segment.length,
                **_learned(dataset.sources[segment.source], segment),
            }
            for number, segment in found
        ],
    }


def _learned(source: Source, segment: Segment) -> dict[str, int]:
    """Of a conversation how many labels are the assistant's."""
    if source.conversations is None:
        return {}
    rest = (
        int(source.dataset.document_lengths[segment.document]) - segment.start - 1
    )  # after the last is no label
    row = (segment.document, segment.start, min(segment.length, rest))
    return {"answer_tokens": int(answers_among(source.dataset, [row], segment.length).sum())}


def steps_with(run_dir: Path | str, wanted: Mapping[str, Set[int]]) -> dict[str, dict[int, list[int]]]:
    """Which steps of a run trained on some documents, as far as the run has come.

    Args:
        run_dir: the run.
        wanted: numbers of documents by the name of their source in the run's config.yaml.

    Returns:
        For each source and document the steps (from 1), in order; documents that no step saw are missing.

    Raises:
        UserError: as `trace_step`.
    """
    config = _config_of(run_dir)
    schedule = BatchSchedule.of(config.train)
    dataset, _ = _open_data(config, schedule, Path(run_dir))
    numbers = {number: wanted[name] for number, name in enumerate(dataset.source_names) if wanted.get(name)}
    found: dict[str, dict[int, list[int]]] = {}
    for step in range(1, _steps_done(Path(run_dir)) + 1) if numbers else ():
        first = schedule.samples_before(step)
        for sample in range(first, first + schedule.batch_size(step)):
            for segment in dataset.segments(sample):
                if segment.document in numbers.get(segment.source, ()):
                    steps = found.setdefault(dataset.source_names[segment.source], {}).setdefault(
                        segment.document, []
                    )
                    if step not in steps[-1:]:
                        steps.append(step)
    return found


def _config_of(run_dir: Path | str) -> Config:
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: there is no {path}")
    return load_config(path)


def _open_data(config: Config, schedule: BatchSchedule, run_dir: Path) -> tuple[PackedDataset, bool]:
    """The training data of a run, and whether it was found to be what the run recorded."""
    provenance = last_provenance(run_dir)
    data = _located(config.data, provenance.get("working_directory"))
    dataset = build_train_dataset(data, config.train.seq_len, vocabulary(data), schedule)
    return dataset, _verify(dataset, provenance, run_dir)


def _steps_done(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none. A torn last line does not count."""
    path = run_dir / "metrics.jsonl"
    last = 0
    if path.is_file():
        with open(path, "rb") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    last = max(last, int(json.loads(line)["step"]))
    return last


def last_provenance(run_dir: Path) -> dict[str, Any]:
    """What the last start of the run recorded; empty when nothing was. A torn last line does not count."""
    path = run_dir / "provenance.jsonl"
    if not path.is_file():
        return {}
    for line in reversed(path.read_bytes().splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a kill while writing leaves a torn line
        if isinstance(record, dict):
            return record
    return {}


def _located(data: DataSection, working_directory: str | None) -> DataSection:
    """The section with the paths that lie in the run's working directory instead of this one."""
    if working_directory is None:
        return data
    base = Path(working_directory)
    train, validation = (
        tuple(
            source.model_copy(
                update={"path": find_prefix(source.path, working_directory) or base / source.path}
            )
            for source in sources
        )
        for sources in (data.train, data.validation)
    )
    tokenizer = data.tokenizer if data.tokenizer.exists() else base / data.tokenizer
    return data.model_copy(update={"tokenizer": tokenizer, "train": train, "validation": validation})


def _verify(dataset: PackedDataset, provenance: dict[str, Any], run_dir: Path) -> bool:
    """Whether the data was found to be what the run recorded; False when it recorded nothing."""
    recorded = (provenance.get("data_fingerprints") or {}).get("train")
    if recorded is None:
        _log.warning(
            "%s does not say which data the run read (no provenance.jsonl): this is what it saw only if the "
            "data is still the same",
            run_dir,
        )
        return False
    if recorded != dataset.fingerprint:
        paths = ", ".join(str(source.dataset.prefix) for source in dataset.sources)
        raise UserError(
            f"the data of {run_dir} has changed since the run: its fingerprint is {dataset.fingerprint}, "
            f"{run_dir / 'provenance.jsonl'} has {recorded}. Put back the data the run read ({paths}), or "
            "work in the directory the run was started from"
        )
    return True


def read_ids(prefix: Path | str, documents: Iterable[int]) -> dict[int, Any]:
    """The ids of some documents, as recorded by tokenization; empty when none were."""
    wanted = set(documents)
    path = ids_path(prefix)
    if not wanted or not path.is_file():
        return {}
    last = max(wanted)
    found = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            if number in wanted:
                found[number] = json.loads(line, parse_constant=str)  # NaN is not JSON
            if number == last:
                break
    return found
