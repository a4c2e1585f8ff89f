"""`data trace`: which documents a step of a run trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meditron_train.config.load import load_config
from meditron_train.config.schema import DataSection
from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.index_file import idx_path
from meditron_train.data.meta import ids_path
from meditron_train.data.packed import PackedDataset, build_train_dataset
from meditron_train.errors import UserError
from meditron_train.log import get_logger

log = get_logger(__name__)


def trace_step(run_dir: Path | str, step: int) -> dict[str, Any]:
    """The samples of a step (from 1), rebuilt from RUN/config.yaml and the data.

    Relative paths that are not in the working directory are looked up in that of the run. UserError when the
    data is not what the run recorded in RUN/provenance.jsonl; without that record nothing can be compared,
    which is logged and told by data_verified.

    Returns step, first_sample, num_samples, data_fingerprint, data_verified and segments: rows with sample,
    source (its name), document (its number in the dataset), id (from the tokenized file, or None), start and
    length in tokens.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: there is no {path}.")
    config = load_config(path)
    if not 1 <= step <= config.train.steps:
        raise UserError(f"Step {step} is not one of this run: it has the steps 1 to {config.train.steps}.")
    provenance = _last_provenance(Path(run_dir))
    data = _located(config.data, provenance.get("working_directory"))
    dataset = build_train_dataset(data, config.train.seq_len)
    verified = _verify(dataset, provenance, Path(run_dir))
    schedule = BatchSchedule(config.train.global_batch_size, config.train.batch_ramp)
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
            }
            for number, segment in found
        ],
    }


def _last_provenance(run_dir: Path) -> dict[str, Any]:
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
            source
            if idx_path(source.path).exists()
            else source.model_copy(update={"path": base / source.path})
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
        log.warning(
            "%s does not say which data the run read (no provenance.jsonl): this is what it saw only if the "
            "data is still the same",
            run_dir,
        )
        return False
    if recorded != dataset.fingerprint:
        paths = ", ".join(str(source.dataset.prefix) for source in dataset.sources)
        raise UserError(
            f"The data of {run_dir} has changed since the run: its fingerprint is {dataset.fingerprint}, "
            f"{run_dir / 'provenance.jsonl'} has {recorded}. Put back the data the run read ({paths}), or "
            "work in the directory the run was started from."
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
