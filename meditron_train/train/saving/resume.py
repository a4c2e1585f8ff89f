"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.adapters import adapter_facts
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.sharded.read import read_meta
from meditron_train.checkpoint.sharded.store import FINISHED_NAME, CheckpointStore, newest_checkpoint, step_of
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import Cause, UserError
from meditron_train.log import get_logger
from meditron_train.train.setup import Plan

_log = get_logger(__name__)


def chosen_checkpoint(directory: Path, from_step: int | None) -> Path | None:
    """The checkpoint below `directory` that a start continues from: the newest, or the one of `from_step`.

    A start that is repeated (a requeued job has the same command) does not go back again: checkpoints made since say
    from which step they came.

    Raises:
        UserError: there is no checkpoint of `from_step`.
    """
    newest = newest_checkpoint(directory)
    if from_step is None:
        return newest
    if newest is not None and read_meta(newest).get("from_step") == from_step:
        _log.info(
            "--from-step %d was obeyed before, and %s came of it: the run goes on from there. To go back once more, "
            "move the checkpoints after step %d away",
            *(from_step, newest, from_step),
        )
        return newest
    store = CheckpointStore(directory, keep_last=1, keep_every=None)
    if from_step not in store.steps():
        found = ", ".join(map(str, store.steps())) or "none"
        raise UserError(
            f"--from-step {from_step}: {directory} has no checkpoint of this step; it has {found}"
        )
    require_intact(store.path(from_step))
    return store.path(from_step)


def set_aside_later(checkpoint: Path) -> None:
    """Give the checkpoints after this one names that no start looks at; they are kept."""
    for path in sorted(checkpoint.parent.glob("step_*")):
        if not FINISHED_NAME.fullmatch(path.name) or step_of(path) <= step_of(checkpoint):
            continue
        names = (path.with_name(f"{path.name}.set_aside_{number}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        _log.info("%s is set aside as %s", path, aside.name)


def check_continues(plan: Plan, directory: Path) -> None:
    """Refuse to continue from a checkpoint of the run that does not fit `plan`.

    Raises:
        UserError: it is of another model, of other data, or further than the run is to go.
    """
    meta = read_meta(directory)
    # Read as a model, so that a checkpoint from before a field was added has its default.
    ours, theirs = (
        m.model_dump(mode="json") for m in (plan.model, ModelConfig.model_validate(meta["model"]))
    )
    steps = plan.config.train.steps
    differing = [f"{key}: {theirs[key]!r} -> {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise UserError(
            f"{directory} is a checkpoint of another model (then -> now): {'; '.join(differing)}. "
            "Put these back, or give a new logging.run_dir",
            cause=Cause.CHANGED,
        )
    check_adapters(plan, directory, meta)
    if meta.get("data_fingerprint") not in (None, plan.train_data.fingerprint_until(meta["samples"])):
        raise UserError(
            f"the training data, or a phase of data.phases that had begun, has changed since {directory} was written, "
            "though its names are the same: the run would not see each sample once. Restore the files and data.phases, "
            "or give a new logging.run_dir",
            cause=Cause.CHANGED,
        )
    if meta["step"] > steps:
        raise UserError(
            f"{directory} is further than train.steps = {steps}. Raise it, or give a new logging.run_dir"
        )


def check_adapters(plan: Plan, directory: Path, meta: Mapping[str, Any]) -> None:
    """Refuse to continue with other adapters, or the same ones on another base."""
    ours = None if plan.config.lora is None else adapter_facts(plan.config.lora, None, None)["lora"]
    theirs = meta.get("lora")
    if (ours is None) != (theirs is None):
        what = "the whole model" if theirs is None else "adapters alone (lora)"
        raise UserError(
            f"{directory} is a checkpoint of {what}, which this configuration does not train. Put lora back as it was, "
            "or give a new logging.run_dir",
            cause=Cause.CHANGED,
        )
    if ours is None or theirs is None:
        return
    differing = [
        f"{key}: {theirs.get(key)!r} -> {ours[key]!r}"
        for key in ("rank", "alpha", "targets")
        if theirs.get(key) != ours[key]
    ]
    if differing:
        raise UserError(
            f"{directory} is a checkpoint of other adapters (then -> now): {'; '.join(differing)}. Put these back, or "
            "give a new logging.run_dir",
            cause=Cause.CHANGED,
        )
    base_sha256 = meta["base"]["weights_sha256"]
    if plan.base_sha256 is not None and plan.base_sha256 != base_sha256:
        raise UserError(
            f"{directory} holds adapters for other weights than {plan.config.model.from_}: their hash was "
            f"{base_sha256[:12]}…, now it is {plan.base_sha256[:12]}…. Put the base back, or give a new "
            "logging.run_dir",
            cause=Cause.CHANGED,
        )
