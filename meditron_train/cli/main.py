"""`meditron-train`: the verbs, and the one place where an error becomes a message and an exit code.

Exit codes: 0 done; 1 the program failed; 2 the user's input or configuration is wrong; 85 stopped early on
purpose, or by a fault that a new start mends, wants to be requeued; 130 interrupted from the keyboard.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from meditron_train import __version__
from meditron_train.cli import convert, data
from meditron_train.cli.demo import demo
from meditron_train.cli.doctor import doctor
from meditron_train.cli.generate import generate
from meditron_train.cli.preflight import preflight
from meditron_train.cli.submit import submit
from meditron_train.cli.train import train
from meditron_train.errors import WRONG_PATH, MeditronError, UserError
from meditron_train.log import setup_logging


class _Verbs(TyperGroup):
    """Runs a verb: errors meant for people lose their traceback, and an integer result is the exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
        except MeditronError as error:
            if isinstance(error, UserError) and ctx.invoked_subcommand == "train":
                _tell_batch_script(error)
            if ctx.params.get("debug"):
                raise
            if message := _message(error):
                print(message, file=sys.stderr, flush=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if ctx.params.get("debug") or error.filename is None:
                raise
            where = f"{error.strerror}: {error.filename}"
            print(
                f"error: {where} (meditron-train --debug shows where it happened)",
                file=sys.stderr,
                flush=True,
            )
            raise typer.Exit(2 if error.errno in WRONG_PATH else 1) from None
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            print("interrupted", file=sys.stderr, flush=True)
            raise typer.Exit(130) from None
        if isinstance(result, int):
            raise typer.Exit(int(result))
        return result


def _message(error: MeditronError) -> str:
    """What to print for an error; "" for nothing.

    A user's mistake is met by every rank: rank 0 tells it whole, and one rank of each other node its first line, as it
    may be that node's alone (a file that only exists elsewhere).
    """
    rank, local_rank = _place()
    text = str(error)
    if rank == 0:
        return f"error: {text}"
    if isinstance(error, UserError):
        if local_rank != 0:
            return ""
        text = text.partition("\n")[0]
    return f"[rank {rank}] error: {text}"


def _tell_batch_script(error: UserError) -> None:
    """Leave LOG_DIR/user_error for launch/train.sbatch, which cannot see the exit code through torchrun: starting again
    would not help.

    Rank 0 alone, as a mistake of the run's is met by it too; a file that only another rank misses is that node's fault.
    """
    log_dir = os.environ.get("LOG_DIR")
    if log_dir and "SLURM_JOB_ID" in os.environ and _place()[0] == 0:
        with suppress(OSError):
            (Path(log_dir) / "user_error").write_text(f"{error}\n", encoding="utf-8")


def _place() -> tuple[int, int]:
    """(rank, local rank) as torchrun or srun gave them; (0, 0) where they are not to be read."""
    from meditron_train.launcher.environment import detect_launcher

    try:
        launch = detect_launcher()
    except UserError:  # which is then the error to be told
        return 0, 0
    return launch.rank, launch.local_rank


app = typer.Typer(
    name="meditron-train",
    cls=_Verbs,
    help="Continue the pretraining of Llama-2 on medical text; get back a checkpoint that can be checked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would cost a third of the time
    pretty_exceptions_enable=False,  # Python's own traceback, for bugs
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"meditron-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    setup_logging()


app.command()(demo)
app.command()(doctor)
app.add_typer(data.app, name="data")
app.command()(train)
app.command()(submit)
app.command()(preflight)
app.add_typer(convert.app, name="convert")
app.command()(generate)


def main() -> None:
    """Run the command line of this process; exits."""
    app(prog_name="meditron-train")


if __name__ == "__main__":
    main()
