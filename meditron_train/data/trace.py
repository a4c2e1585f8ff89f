"""`data trace`: which documents a step of a run trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meditron_train.config.load import load_config
from meditron_train.data.batch_schedule import BatchSchedule
from meditron_train.data.meta import ids_path
from meditron_train.data.packed import build_train_dataset
from meditron_train.errors import UserError


def trace_step(run_dir: Path | str, step: int) -> dict[str, Any]:
    """The samples of a step (from 1), rebuilt from RUN/config.yaml and the data.

    Returns step, first_sample, num_samples, data_fingerprint and segments: rows with sample, source (its
    name), document (its number in the dataset), id (from the tokenized file, or None), start and length in
    tokens.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: there is no {path}.")
    config = load_config(path)
    if not 1 <= step <= config.train.steps:
        raise UserError(f"Step {step} is not one of this run: it has the steps 1 to {config.train.steps}.")
    dataset = build_train_dataset(config.data, config.train.seq_len)
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
                found[number] = json.loads(line)
            if number == last:
                break
    return found
