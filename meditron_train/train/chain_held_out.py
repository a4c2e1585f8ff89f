"""What earlier runs of a chain held out: a run may start from the checkpoint or the export of another run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.sharded.read import is_sharded_directory, read_meta
from meditron_train.config.schema import Config
from meditron_train.config.yaml_file import read_yaml
from meditron_train.data.index_file import bin_path
from meditron_train.errors import MeditronError
from meditron_train.log import get_logger

_log = get_logger(__name__)
_MAX_RUNS = 20


def warn_of_earlier_held_out(config: Config) -> None:
    """Warn where this run trains on documents that an earlier run of its chain validated on.

    A file that says nothing of use is passed over.
    """
    for origin, earlier in _earlier_runs(config.model.from_):
        data = earlier.get("data")
        if not isinstance(data, Mapping):
            continue
        for source in config.data.train:
            if any(_is_same(source.path, path) for path in _paths(data.get("validation"))):
                _log.warning(
                    "training source %s was a validation source of the run that made %s", source.name, origin
                )
            fraction = data.get("validation_fraction")
            if (
                isinstance(fraction, int | float)
                and fraction > config.data.validation_fraction
                and any(_is_same(source.path, path) for path in _paths(data.get("train")))
            ):
                _log.warning(
                    "the run that made %s held out a fraction of %g of the documents of training source %s, this run "
                    "%g: it trains on some that were validated on. data.validation_fraction=%g holds out the same ones",
                    *(origin, fraction, source.name, config.data.validation_fraction, fraction),
                )


def _earlier_runs(from_: Path | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """(the model, the configuration of the run that made it), the latest first, as far as they can be found."""
    for _ in range(_MAX_RUNS):
        config = _config_behind(from_) if from_ is not None else None
        if from_ is None or config is None:
            return
        yield from_, config
        model = config.get("model")
        before = model.get("from") if isinstance(model, Mapping) else None
        from_ = Path(before) if isinstance(before, str) else None


def _config_behind(from_: Path) -> Mapping[str, Any] | None:
    """The configuration of the run that made a sharded checkpoint, or an export in its run directory."""
    try:
        if is_sharded_directory(from_):
            config = read_meta(from_).get("config")
        else:
            config = read_yaml(from_.parent / "config.yaml", unescape=True)
    except (OSError, ValueError, MeditronError):
        return None
    return config if isinstance(config, Mapping) else None


def _paths(sources: Any) -> list[str]:
    """Of what may be anything: the file is not ours to check."""
    listed = sources if isinstance(sources, list) else []
    found = [source.get("path") for source in listed if isinstance(source, Mapping)]
    return [path for path in found if isinstance(path, str)]


def _is_same(path: Path, other: str) -> bool:
    try:
        return os.path.samefile(bin_path(path), bin_path(other))
    except (OSError, ValueError):  # ValueError: a name that cannot be one
        return False
