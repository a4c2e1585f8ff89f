"""`meditron-train train`: continue a pretraining, alone or as one rank of many."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace those of the file.", metavar="[section.field=value]..."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Start this many ranks on this machine.")
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(
            "--from-step",
            min=1,
            help="Go back to the run's checkpoint of this step; later ones are set aside.",
        ),
    ] = None,
) -> None:
    """Train, as one process; --processes N starts N ranks here. Under torchrun or srun it is one of their ranks.

    Started again with the same run directory, it continues from the newest intact checkpoint. Exit code 85: asked
    to stop (SIGTERM, SIGUSR1, Ctrl-C, a file RUN_DIR/stop), saved, and can be started again. SIGUSR2
    writes the stacks of all Python threads to RUN_DIR/logs; training goes on.

    \b
    Examples:
      meditron-train train configs/demo.yaml
      meditron-train train configs/demo.yaml --processes 4 parallel.tensor=2
      torchrun --nproc-per-node 8 -m meditron_train train configs/llama2-7b.yaml
    """
    from meditron_train.config.load import load_config
    from meditron_train.flows.early_check import check_before_imports
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.launcher.threads import wait_without_spinning
    from meditron_train.train.life.stacks import write_stacks_to_stderr
    from meditron_train.train.life.stop_signals import StopSignals

    settings = load_config(config, overrides or [])
    launch = detect_launcher()
    if launch.rank == 0:  # the others find the same, or tell it when the ranks meet
        check_before_imports(settings, processes or launch.world_size)
    if processes is not None:
        from meditron_train.launcher.local_ranks import run_ranks

        words = [sys.executable, "-m", "meditron_train", "train", str(config), *(overrides or [])]
        words += [] if from_step is None else ["--from-step", str(from_step)]
        raise typer.Exit(run_ranks(words, processes))
    wait_without_spinning(os.environ)
    write_stacks_to_stderr()
    # From here on a signal is a request, also in the seconds that torch and megatron-core take to import.
    with StopSignals(settings.logging.run_dir, checks_files=launch.rank == 0) as signals:
        from meditron_train.train import start

        exit_code = start.train(settings, launch, signals, from_step)
        signals.ignore()
    raise typer.Exit(exit_code)
