"""Checkpoints on each node's own disk or memory, for a quick restart of the same ranks on the same nodes.

    LOCAL_DIR/RUN_ID/rank_00003/step_00000120.pt     the rank's tensors, as they are
                                step_00000120.json   written last: its size and hash, layout, counters

Between two checkpoints that everyone can read, each rank keeps its own part to itself: no communication, no shared file
system. A restart uses it only when every rank finds its part, intact, of the same step and layout, and made with the
same model, data and batches; otherwise, and whenever the other checkpoints are newer, it is ignored. Failures here cost
a warning and never the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.files.torch_file import load_torch_file
from meditron_train.checkpoint.manifest import describe_file
from meditron_train.errors import UserError
from meditron_train.files import read_json_object, replace_text
from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.train.engine import Engine
from meditron_train.train.engine_state import load_local_state, local_state
from meditron_train.train.progress import Progress
from meditron_train.train.saving.changed_settings import fixed_differences
from meditron_train.train.setup import Plan

_log = get_logger(__name__)

_NAME = re.compile(r"step_(\d{8,})\.(pt|json)(\.tmp)?")  # other names are not ours
_KEPT = 2  # the newest, and the one before in case a rank dies while it writes the newest


class LocalCheckpoints:
    """Those of one rank; without `checkpoint.local_dir` nothing is written or found. Making it is collective.

    Args:
        run_id: distinguishes this run from others that use the same local directory.
    """

    def __init__(self, plan: Plan, mesh: Mesh, run_id: str) -> None:
        self._mesh = mesh
        local_dir = plan.config.checkpoint.local_dir
        self._directory = local_dir / run_id / f"rank_{mesh.rank:05d}" if local_dir and run_id else None
        self._identity = {
            "layout": asdict(plan.layout),
            "precision": plan.config.train.precision,
            "distributed_optimizer": plan.config.parallel.distributed_optimizer,
            "model": plan.model.model_dump(mode="json"),
            "lora": plan.config.lora and plan.config.lora.model_dump(mode="json"),
        }
        if plan.config.lora is not None:
            self._identity["base_sha256"] = mesh.from_first_rank(plan.base_sha256)
        self._config = plan.config.model_dump(mode="json", by_alias=True)
        self._train_data = plan.train_data
        self._max_step = plan.config.train.steps

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write this rank's part; training stands still meanwhile. Collective only with overlap_param_gather."""
        if self._directory is None:
            return
        start = time.monotonic()
        engine.gather_params()
        tensors, sidecar = self._paths(progress.step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            sidecar.unlink(missing_ok=True)
            torch.save({**local_state(engine), "rng": torch.get_rng_state()}, tensors)
            facts = {
                **self._identity_at(progress.samples),
                **describe_file(tensors, sync=True),
                "config": self._config,
                "progress": asdict(progress),
            }
            replace_text(sidecar, json.dumps(facts) + "\n")
            self._delete_all_but(self._steps()[-_KEPT:])
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            _log.warning("rank %d could not save step %d locally: %s", self._mesh.rank, progress.step, error)
            with contextlib.suppress(OSError):
                tensors.unlink(missing_ok=True)
            return
        _log.info("saved step %d locally in %.1f s", progress.step, time.monotonic() - start)

    def newest(self) -> int | None:
        """The newest step that every rank holds intact; collective."""
        mine = [step for step in self._steps() if self._is_intact(step)]
        common = set.intersection(*(set(steps) for steps in self._mesh.gather_objects(mine)))
        return max(common, default=None)

    def load(self, engine: Engine, step: int) -> Progress:
        """Continue from this rank's part of `step`, which `newest` found."""
        tensors, sidecar = self._paths(step)
        with tensors.open("rb") as file:
            state = load_torch_file(file.fileno())
        load_local_state(engine, state)
        torch.set_rng_state(state["rng"])
        _log.info("resuming from the local checkpoints in %s, after step %d", self._directory, step)
        return Progress(**read_json_object(sidecar)["progress"])

    def remove_others(self, from_step: int) -> None:
        """Remove what was saved before the run went back to the checkpoint of `from_step`."""
        kept = [step for step in self._steps() if self._from_step_of(step) == from_step]
        with contextlib.suppress(OSError):
            self._delete_all_but(kept)

    def remove(self) -> None:
        """The run is done: leave nothing on the node."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _identity_at(self, num_samples: int) -> dict[str, Any]:
        return {**self._identity, "data_fingerprint": self._train_data.fingerprint_until(num_samples)}

    def _paths(self, step: int) -> tuple[Path, Path]:
        assert self._directory is not None
        return self._directory / f"step_{step:08d}.pt", self._directory / f"step_{step:08d}.json"

    def _steps(self) -> list[int]:
        if self._directory is None:
            return []
        names = (_NAME.fullmatch(path.name) for path in self._directory.glob("step_*.json"))
        return sorted(int(name[1]) for name in names if name)

    def _from_step_of(self, step: int) -> int | None:
        try:
            return Progress(**read_json_object(self._paths(step)[1])["progress"]).from_step
        except (UserError, LookupError, TypeError):
            return None

    def _is_intact(self, step: int) -> bool:
        tensors, sidecar = self._paths(step)
        try:
            facts = read_json_object(sidecar)
            progress = Progress(**facts["progress"])
            if progress.step != step:
                return False
            identity = self._identity_at(progress.samples)
            facts.setdefault("base_sha256", identity.get("base_sha256"))  # earlier versions wrote neither it
            same = all(facts.get(name) == value for name, value in identity.items())  # nor the configuration
            if changed := fixed_differences(facts.get("config", {}), self._config):
                _log.info("passing over %s, of another configuration: %s", tensors, "; ".join(changed))
                return False
            return same and step <= self._max_step and describe_file(tensors)["sha256"] == facts["sha256"]
        except (OSError, ValueError, LookupError, TypeError, UserError):
            return False

    def _delete_all_but(self, kept: list[int]) -> None:
        if self._directory is None:
            return
        for path in self._directory.glob("step_*"):
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) not in kept:
                os.unlink(path)
