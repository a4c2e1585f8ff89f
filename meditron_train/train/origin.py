"""Where the numbers of a run come from, as a start of it records them in provenance.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.parallel import Mesh
from meditron_train.report.provenance import collect_provenance
from meditron_train.train.setup import Plan


def run_provenance(
    plan: Plan, mesh: Mesh, launch: LaunchEnvironment, hosts: Sequence[str], step: int
) -> dict[str, Any]:
    """The record of a start that continues after `step`.

    Args:
        hosts: the host of each rank.
    """
    fingerprints = {"train": plan.train_data.fingerprint}
    fingerprints |= {f"validation.{name}": data.fingerprint for name, data in plan.validation_data.items()}
    record = collect_provenance(
        plan.config.model_dump(mode="json", by_alias=True),
        fingerprints,
        {
            **asdict(launch),
            "layout": asdict(plan.layout),
            "resumed_after_step": step,
            "rank_hosts": list(hosts),
            "device": mesh.device_name,
        },
    )
    seq_len = plan.config.train.seq_len
    return {
        **record,
        "model": {**plan.model.model_dump(mode="json"), "num_parameters": plan.model.num_parameters},
        "tokens_per_epoch": {
            name: samples * seq_len
            for name, samples in plan.train_data.samples_per_epoch_of_sources().items()
        },
    }
