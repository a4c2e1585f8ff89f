"""`meditron-train`: the verbs, and the one place where an error becomes a message and an exit code.

Exit codes: 0 done; 1 the program failed; 2 the user's input or configuration is wrong; 85 stopped early on
purpose, or by a fault that a restart fixes, wants to be requeued; 130 interrupted from the keyboard.
"""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from meditron_train import __version__
from meditron_train.cli import config, convert, corpus, data
from meditron_train.cli.demo import demo
from meditron_train.cli.doctor import doctor
from meditron_train.cli.evaluate import evaluate
from meditron_train.cli.generate import generate
from meditron_train.cli.plan import plan
from meditron_train.cli.preflight import preflight
from meditron_train.cli.publish import publish
from meditron_train.cli.report import report
from meditron_train.cli.submit import submit
from meditron_train.cli.train import train
from meditron_train.errors import WRONG_PATH, ExitCode, MeditronError, UserError
from meditron_train.log import printable, setup_logging


class _Verbs(TyperGroup):
    """Runs a verb: errors meant for people lose their traceback, and an integer result is the exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As usual, but an unknown verb is answered with the nearest one, those of groups too."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            paths = {path.rpartition(" ")[2]: path for path in reversed(list(_paths(self, ctx)))}
            near = difflib.get_close_matches(name, paths, n=1)
            hint = (
                f"did you mean `{ctx.info_name} {paths[near[0]]}`?" if near else "--help lists the commands"
            )
            ctx.fail(f"there is no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
        except MeditronError as error:
            if isinstance(error, UserError) and ctx.invoked_subcommand == "train":
                _leave_for_batch_script(error)
            if ctx.params.get("debug"):
                raise
            if message := _message(error):
                print(printable(message), file=sys.stderr, flush=True)
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
            raise typer.Exit(ExitCode.USER_ERROR if error.errno in WRONG_PATH else ExitCode.FAILED) from None
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            print("interrupted", file=sys.stderr, flush=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        if isinstance(result, int):
            raise typer.Exit(int(result))
        return result


def _paths(group: TyperGroup, ctx: Any) -> Iterator[str]:
    """Every verb as it is written: "train", "data tokenize" ..."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield name
        if isinstance(command, TyperGroup):
            yield from (f"{name} {path}" for path in _paths(command, ctx))


def _message(error: MeditronError) -> str:
    """What to print for an error; "" for nothing.

    A user's mistake is met by every rank: one rank of each node reports it, as it may be that node's alone (a file that
    only exists elsewhere).
    """
    rank, local_rank = _place()
    if rank == 0:
        return f"error: {error}"
    if isinstance(error, UserError) and local_rank != 0:
        return ""
    return f"[rank {rank} on host {socket.gethostname()}] error: {error}"


def _leave_for_batch_script(error: UserError) -> None:
    """Rank 0 alone, as a mistake of the run's is met by it too; what only another rank meets is in its failure file."""
    from meditron_train.flows.job_end import leave_user_error

    if _place()[0] == 0:
        leave_user_error(error)


def _place() -> tuple[int, int]:
    """(rank, local rank) as torchrun or srun gave them; (0, 0) where they are not to be read."""
    from meditron_train.launcher.environment import detect_launcher

    try:
        launch = detect_launcher()
    except UserError:  # which is then the error to report
        return 0, 0
    return launch.rank, launch.local_rank


app = typer.Typer(
    name="meditron-train",
    cls=_Verbs,
    help="Continue the pretraining of Llama-2 on medical text; get back a checkpoint that can be checked.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
app.add_typer(config.app, name="config")
app.command("launch-scripts")(config.launch_scripts)
app.add_typer(data.app, name="data")
app.add_typer(corpus.app, name="corpus")
app.command()(plan)
app.command()(train)
app.command()(submit)
app.command()(preflight)
app.add_typer(convert.app, name="convert")
app.command()(generate)
app.command()(evaluate)
app.command()(report)
app.command()(publish)


def main() -> None:
    """Run the command line of this process; exits."""
    for path in (*sys.argv[1:], os.fsdecode(os.getcwdb())):
        if not _is_utf8(path):  # the libraries that read tokenizers and weights take no other name
            shown = path.encode("utf-8", "backslashreplace").decode()
            print(f"error: {shown} is not UTF-8. Rename it, or name it by a link that is", file=sys.stderr)
            raise SystemExit(UserError.exit_code)
    app(prog_name="meditron-train")


def _is_utf8(path: str) -> bool:
    """Bytes of a name that are not UTF-8 reach Python as lone surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


if __name__ == "__main__":
    main()
