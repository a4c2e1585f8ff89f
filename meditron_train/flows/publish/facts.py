"""What a run has recorded of itself, as far as a model card tells it. No path, host or user name is among it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from meditron_train.checkpoint.manifest import MANIFEST_NAME
from meditron_train.checkpoint.sharded.read import read_meta
from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.corpus.manifest import Dataset, FinishedCorpus, dataset_of_prefix
from meditron_train.data.index_file import bin_path, find_prefix
from meditron_train.data.indexed import IndexedDataset
from meditron_train.errors import UserError
from meditron_train.files import sha256_file
from meditron_train.flows.publish.origin import Origin
from meditron_train.flows.report.resources import hardware_of, measured_power_w, rank_seconds_of
from meditron_train.layout import ParallelLayout
from meditron_train.planner.cost import RunCost
from meditron_train.planner.hardware import find_hardware
from meditron_train.report.curves import Metrics
from meditron_train.report.metrics import VALIDATION_PREFIX
from meditron_train.report.run_record import RunRecord, launch_of, mapping, read_run, whole


@dataclass(frozen=True)
class DataSource:
    """One source of training text.

    Attributes:
        documents, tokens, licenses: None or empty where its files are not here, or do not tell.
        corpus: name and version of the corpus that it belongs to, with the hash of its manifest.
    """

    name: str
    share: str
    documents: int | None = None
    tokens: int | None = None
    licenses: tuple[str, ...] = ()
    corpus: str = ""


@dataclass(frozen=True)
class Work:
    """What the training took: all starts of the run, also what was lost, as `report` counts it.

    Attributes:
        tokens_per_second, mfu: medians over the steps.
        device: as the driver names it, or "cpu".
        gpu: its name in planner.hardware; None where that does not know it.
        measured_power_w: mean of a rank's GPU where NVML counted its energy.
    """

    rank_seconds: float
    world_size: int | None
    tokens_per_second: float | None
    mfu: float | None
    device: str | None
    gpu: str | None
    measured_power_w: float | None

    def cost(self, pue: float, carbon_kg_per_kwh: float) -> RunCost | None:
        """By the measured power, else the board's limit; None where neither, or no time, is known."""
        power_w = self.measured_power_w or (find_hardware(self.gpu).power_w if self.gpu else None)
        if power_w is None or not self.rank_seconds:
            return None
        return RunCost(self.rank_seconds, 1, power_w, pue, carbon_kg_per_kwh)


@dataclass(frozen=True)
class RunFacts:
    """What the card tells of a run.

    Attributes:
        config: what the checkpoint was trained with.
        tokens: read in training, padding included; None where that is not recorded.
        learned_tokens: labels that counted in the loss; None where not every step is recorded.
        losses: the last training loss and validation losses by name.
        work: None without a run directory.
        hashes: of checkpoint, configuration and data, by what they are of.
        versions: of program and libraries.
    """

    config: Config
    step: int
    tokens: int | None
    learned_tokens: int | None
    layout: ParallelLayout | None
    losses: Mapping[str, float]
    work: Work | None
    data: tuple[DataSource, ...]
    hashes: Mapping[str, str]
    versions: Mapping[str, str]


def collect_facts(origin: Origin, gpu: str | None) -> RunFacts | None:
    """From the training checkpoint and the run directory; None where neither is known.

    Args:
        gpu: name of the GPU in planner.hardware, where the run does not tell.

    Raises:
        UserError: the GPU is unknown, or the run's configuration cannot be read.
    """
    meta = read_meta(origin.training) if origin.training is not None else {}
    config = _config(meta, origin.run_dir)
    if config is None:
        return None
    if gpu is not None:
        find_hardware(gpu)
    run = read_run(origin.run_dir) if origin.run_dir is not None else None
    start = run.last_provenance if run is not None else {}
    step = int(meta.get("step") or origin.source.get("step") or 0)
    return RunFacts(
        config=config,
        step=step,
        tokens=_tokens(meta, run, step),
        learned_tokens=_learned_tokens(run.metrics, step) if run is not None else None,
        layout=_layout(meta.get("layout") or launch_of(start).get("layout")),
        losses=_losses(run.metrics, step) if run is not None else {},
        work=_work(run, gpu) if run is not None else None,
        data=tuple(_source(config, number, start) for number in range(len(config.data.train))),
        hashes=_hashes(origin, meta, start),
        versions=mapping(start.get("versions")) or mapping(meta.get("versions")),
    )


def _config(meta: Mapping[str, Any], run_dir: Path | None) -> Config | None:
    if isinstance(meta.get("config"), dict):
        try:
            return Config.model_validate(meta["config"])
        except ValidationError:  # of a version with other keys: the run's own file says it in words
            pass
    path = run_dir / "config.yaml" if run_dir else None
    return load_config(path) if path is not None and path.is_file() else None


def _layout(values: Any) -> ParallelLayout | None:
    try:
        return ParallelLayout(**values)
    except (TypeError, ValueError):  # of another version
        return None


def _losses(metrics: Metrics, step: int) -> dict[str, float]:
    curves = {
        "training": metrics["loss"],
        **{f"validation, {name}": curve for name, curve in metrics.with_prefix(VALIDATION_PREFIX).items()},
    }
    until = {name: curve.finite.values[curve.finite.steps <= step] for name, curve in curves.items()}
    return {name: float(values[-1]) for name, values in until.items() if len(values)}


def _tokens(meta: Mapping[str, Any], run: RunRecord | None, step: int) -> int | None:
    """By the checkpoint, else by the run's line of that step."""
    if isinstance(known := meta.get("tokens"), int):
        return known
    if run is None:
        return None
    curve = run.metrics["tokens"].finite
    values = curve.values[curve.steps == step]
    return int(values[-1]) if step and len(values) else None


def _learned_tokens(metrics: Metrics, step: int) -> int | None:
    curve = metrics["num_loss_tokens"].finite
    values = curve.values[curve.steps <= step]
    return int(values.sum()) if step and len(values) == step else None


def _work(run: RunRecord, gpu: str | None) -> Work:
    launch, hardware = launch_of(run.last_provenance), hardware_of(run)
    device = launch.get("device")
    return Work(
        rank_seconds=rank_seconds_of(run),
        world_size=whole(launch.get("world_size"), 1) if launch else None,
        tokens_per_second=_median(run.metrics, "tokens_per_second"),
        mfu=_median(run.metrics, "mfu"),
        device=device if isinstance(device, str) else None,
        gpu=gpu or (hardware.name if hardware is not None else None),
        measured_power_w=measured_power_w(run),
    )


def _median(metrics: Metrics, key: str) -> float | None:
    values = metrics[key].finite.values
    return float(np.median(values)) if len(values) else None


def _source(config: Config, number: int, start: Mapping[str, Any]) -> DataSource:
    source = config.data.train[number]
    total = sum(other.weight or 0.0 for other in config.data.train)
    share = (
        f"{source.token_budget:,} tokens" if source.token_budget else f"{(source.weight or 0) / total:.1%}"
    )
    prefix = find_prefix(source.path, start.get("working_directory"))
    if prefix is not None:
        real = bin_path(prefix).resolve().with_suffix("")
        if (dataset := dataset_of_prefix(real)) is not None:
            return _corpus_source(source.name, share, dataset)
        with suppress(UserError):  # damaged: training would have said so
            dataset_file = IndexedDataset(real)
            return DataSource(source.name, share, dataset_file.num_documents, dataset_file.num_tokens)
    return DataSource(source.name, share)


def _corpus_source(name: str, share: str, dataset: Dataset) -> DataSource:
    corpus = FinishedCorpus.open(dataset.root)
    known: dict[str, Any] = next((s for s in corpus.manifest["sources"] if s["name"] == dataset.source), {})
    counts = mapping(mapping(known.get("splits")).get(dataset.split))
    return DataSource(
        name,
        share,
        counts.get("documents"),
        counts.get("tokens"),
        tuple(sorted(known.get("licenses") or ())),
        f"{corpus.manifest['name']}, SHA-256 of its manifest {sha256_file(corpus.manifest_path)[:16]}…",
    )


def _hashes(origin: Origin, meta: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, str]:
    hashes = {}
    if origin.training is not None and (origin.training / MANIFEST_NAME).is_file():
        hashes[f"manifest of the training checkpoint ({origin.training.name})"] = sha256_file(
            origin.training / MANIFEST_NAME
        )
    elif origin.source.get("manifest_sha256"):
        name = origin.source.get("directory")
        hashes[f"manifest of the training checkpoint ({name})"] = str(origin.source["manifest_sha256"])
    if meta.get("data_fingerprint"):
        hashes["training samples seen, in their order"] = str(meta["data_fingerprint"])
    if start.get("config_sha256"):
        hashes["resolved configuration"] = str(start["config_sha256"])
    if commit := mapping(start.get("git")).get("commit"):
        hashes["git commit of the program"] = (
            f"{commit}{', modified' if start['git'].get('modified') else ''}"
        )
    return hashes
