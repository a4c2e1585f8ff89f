"""Which settings a resumed run must keep, and which may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meditron_train.config.schema import Config
from meditron_train.errors import Cause, UserError
from meditron_train.log import get_logger
from meditron_train.train.life.run_dir import RunDir

_log = get_logger(__name__)

# A checkpoint continues only under the model, the samples and their order that it was made with. The rest may
# change: the layout, the length of the run, what is logged, saved and validated, the optimizer's settings.
_FIXED_KEYS = (
    *("model", "data", "train.seq_len", "train.global_batch_size", "train.batch_ramp"),
    *("train.seed", "train.precision", "train.freeze", "parallel.distributed_optimizer"),
)
# Of data.phases those that had begun are checked when the checkpoint is read.
_FREE_KEYS = (
    *("model.allow_nonfinite", "model.license", "data.prefetch", "data.cache_dir"),
    *("data.validation", "data.phases"),
)


def check_settings(run_dir: RunDir, config: Config) -> None:
    """Refuse to resume a directory's run with another model or other data.

    Other differences are logged. Nothing is checked without a checkpoint or without a config.yaml.

    Raises:
        UserError: lists every differing key with both values.
    """
    if not run_dir.has_checkpoints() or not run_dir.config_file.exists():
        return
    fixed: list[str] = []
    free: list[str] = []
    new = config.model_dump(mode="json", by_alias=True)
    for key, old_value, new_value in _differences(run_dir.read_config(), new):
        is_fixed = _is_fixed(key)
        if key == "model.from" and config.model.from_ is not None and run_dir.holds(config.model.from_):
            is_fixed = False  # the base is gone, and one of the run's own checkpoints named in its place
        (fixed if is_fixed else free).append(f"{key}: {old_value!r} -> {new_value!r}")
    if fixed:
        raise UserError(
            f"{run_dir.path} holds checkpoints of a run with another configuration (then -> now):\n"
            + "".join(f"  - {line}\n" for line in fixed)
            + "Give a new logging.run_dir to start another run, or put these values back to resume this one. (If only "
            f"the place of the same files has changed, correct it in {run_dir.config_file}.)",
            cause=Cause.CHANGED,
        )
    if free:
        _log.info("resuming with changed settings (then -> now): %s", "; ".join(free))


def fixed_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs of the settings that a checkpoint fixes: "key: old -> new".

    Args:
        old, new: configurations as `model_dump(mode="json", by_alias=True)` gives them.
    """
    return [f"{key}: {one!r} -> {other!r}" for key, one, other in _differences(old, new) if _is_fixed(key)]


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf that differs.

    Keys that `old` lacks are left out: it may have been written by an earlier version.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            yield from _differences(old[name], new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (old_item, new_item) in enumerate(zip(old, new, strict=True)):
            yield from _differences(old_item, new_item, f"{key}[{index}]")
    elif old != new:
        yield key, old, new


def _is_fixed(key: str) -> bool:
    return _is_under(key, _FIXED_KEYS) and not _is_under(key, _FREE_KEYS)


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)
