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
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.train.stop_signals import StopSignals

    settings = load_config(config, overrides or [])
    launch = detect_launcher()
    # From here on a signal is a request, also in the seconds that torch and megatron-core take to import.
    with StopSignals(settings.logging.run_dir, checks_files=launch.rank == 0) as signals:
        from meditron_train.train import loop

        exit_code = loop.train(settings, launch, signals)
        signals.ignore()
    raise typer.Exit(exit_code)
