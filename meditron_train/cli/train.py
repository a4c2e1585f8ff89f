"""`meditron-train train`: continue a pretraining, alone or as one rank of many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace those of the file.", metavar="[section.field=value]..."),
    ] = None,
) -> None:
    """Train. Alone it is one process; under torchrun or srun it is one rank of many.

    Started again with the same run directory, it continues from the newest intact checkpoint. Exit code 85: asked
    to stop (SIGTERM, SIGUSR1, a file RUN_DIR/stop), saved, and can be started again.
    """
    from meditron_train.config.load import load_config

    settings = load_config(config, overrides or [])
    # Only now that the file is right: torch and megatron-core take seconds to import.
    from meditron_train.train import loop

    raise typer.Exit(loop.train(settings))
