from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from meditron_train import __version__
from meditron_train.cli import main as cli
from meditron_train.errors import MeditronError, UserError
from tests.commands import Command


def run_command(*arguments: str, **environment: str) -> Command:
    """The command, which has ended."""
    command = Command(*arguments, environment={**os.environ, **environment})
    command.wait(timeout=120)
    return command


@pytest.fixture
def app_that_raises(monkeypatch):
    """An application with our error handling and one verb that raises what it is told."""

    def build(error: BaseException | None = None, result: int | None = None) -> typer.Typer:
        app = typer.Typer(cls=type(typer.main.get_command(cli.app)), pretty_exceptions_enable=False)

        @app.callback()
        def options(debug: bool = False) -> None:
            pass

        @app.command()
        def verb() -> int | None:
            if error is not None:
                raise error
            return result

        return app

    return build


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (UserError("train.steps is 0;\n  write 1"), 2, "error: train.steps is 0;\n  write 1\n"),
        (MeditronError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(13, "Permission denied", "/proc/x"),
            2,
            "error: Permission denied: /proc/x (meditron-train --debug shows where it happened)\n",
        ),
        (
            OSError(28, "No space left on device", "/full/x"),
            1,
            "error: No space left on device: /full/x (meditron-train --debug shows where it happened)\n",
        ),
        (
            OSError(30, "Read-only file system", "/failing/x"),
            1,
            "error: Read-only file system: /failing/x (meditron-train --debug shows where it happened)\n",
        ),
        (typer.Exit(85), 85, ""),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    app_that_raises, capsys, monkeypatch, error, exit_code, said
):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_:
        app_that_raises(error)(["verb"])
    assert exit_.value.code == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == said


def as_rank(monkeypatch, launcher: str, rank: int, ranks_per_node: int = 4) -> None:
    local_rank = rank % ranks_per_node
    torchrun = dict(
        RANK=rank,
        LOCAL_RANK=local_rank,
        WORLD_SIZE=16,
        LOCAL_WORLD_SIZE=4,
        MASTER_ADDR="n0",
        MASTER_PORT=29500,
    )
    srun = dict(
        SLURM_PROCID=rank, SLURM_LOCALID=local_rank, SLURM_STEP_NUM_TASKS=16, SLURM_STEP_NODELIST="n[0-3]"
    )
    for name in torchrun:
        monkeypatch.delenv(name, raising=False)
    for name, value in (torchrun if launcher == "torchrun" else srun).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize(
    ("rank", "error", "said"),
    [
        (0, UserError("two\n  - a"), "error: two\n  - a\n"),
        (3, UserError("two\n  - a"), ""),  # rank 0 of the same node tells it
        (
            8,
            UserError("two\n  - a"),
            "[rank 8 on host HOST] error: two\n  - a\n",
        ),  # it may be that node's alone
        (3, MeditronError("two\n  - a"), "[rank 3 on host HOST] error: two\n  - a\n"),
    ],
)
def test_which_rank_tells_an_error(app_that_raises, capsys, monkeypatch, launcher, rank, error, said):
    as_rank(monkeypatch, launcher, rank)
    with pytest.raises(SystemExit) as exit_:
        app_that_raises(error)(["verb"])
    assert exit_.value.code == error.exit_code
    assert capsys.readouterr().err == said.replace("HOST", socket.gethostname())


def test_debug_shows_the_traceback(app_that_raises):
    with pytest.raises(UserError, match="wrong"):
        app_that_raises(UserError("wrong"))(["--debug", "verb"])


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError("no file is to blame")])
def test_a_bug_is_not_hidden(app_that_raises, bug):
    with pytest.raises(type(bug)):
        app_that_raises(bug)(["verb"])


@pytest.mark.parametrize(("result", "exit_code"), [(None, 0), (0, 0), (1, 1), (85, 85)])
def test_an_integer_result_is_the_exit_code(app_that_raises, result, exit_code):
    with pytest.raises(SystemExit) as exit_:
        app_that_raises(result=result)(["verb"])
    assert exit_.value.code == exit_code


def test_version():
    command = [sys.executable, "-m", "meditron_train", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"meditron-train {__version__}\n")


def test_unknown_verbs_and_options_exit_2():
    for arguments, said in (
        (["fly"], "there is no command 'fly'"),
        (["doctor", "--jsonn"], "No such option"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_wrong_configuration_is_one_message_on_stderr(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {from: base}\ndata: {tokenizer: base, train: [{name: a, path: a}]}\n")
    done = run_command("train", str(config), "train.stpes=3", "optimizer.lr=-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean train.steps?" in done.stderr
    assert "optimizer.lr (from the command line) = -1: expected greater than 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from meditron_train.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'megatron', 'numpy', 'pydantic', 'rich', 'wandb', 'pyarrow'}\n"
        "sys.exit(f'loaded: {sorted(heavy & set(sys.modules))}' if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "doctor", "data", "train", "convert", "generate"):
        assert f"  {verb} " in done.stdout


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_rank_0_tells_the_batch_script_of_a_mistake_in_the_configuration(tmp_path, rank, told):
    """torchrun turns the exit code into 1; another rank's mistake may be its node's alone."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    done = run_command(
        "train",
        "/nowhere/config.yaml",
        LOG_DIR=str(tmp_path),
        SLURM_JOB_ID="1",
        LOCAL_WORLD_SIZE="1",
        **place,
    )
    assert done.returncode == 2
    assert (tmp_path / "user_error").exists() is told
    if told:
        record = json.loads((tmp_path / "user_error").read_text())
        assert record["cause"] == "user_error" and "/nowhere/config.yaml" in record["message"]


def test_other_verbs_leave_no_word_for_the_batch_script(tmp_path):
    done = run_command("preflight", "/nowhere/config.yaml", LOG_DIR=str(tmp_path), SLURM_JOB_ID="1")
    assert done.returncode == 2 and not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_one_message(tmp_path) -> None:
    odd = os.fsencode(tmp_path) + b"/mod\xe8le"
    os.mkdir(odd)
    command = [sys.executable, "-m", "meditron_train"]
    for arguments, cwd in (([b"convert", b"inspect", odd], None), ([b"convert", b"inspect", b"."], odd)):
        found = subprocess.run([*command, *arguments], capture_output=True, timeout=120, cwd=cwd)
        assert found.returncode == 2
        assert found.stderr.startswith(b"error: ") and found.stderr.count(b"\n") == 1
        assert b"is not UTF-8" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokenize"], "did you mean `meditron-train data tokenize`?"),
        (["verfy"], "did you mean `meditron-train convert verify`?"),
        (["trian"], "did you mean `meditron-train train`?"),
        (["xyzzy"], "--help lists the commands"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest_one(words, said):
    done = run_command(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["data", "tokenize", "-h"], ["convert", "-h"]])
def test_h_is_help(words):
    done = run_command(*words)
    assert done.returncode == 0 and "Usage: " in done.stdout


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with the words it is called by."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


VERBS = dict(leaves(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help_shows_examples_as_they_are_typed(words):
    context = typer.main.get_command(cli.app).make_context("meditron-train", [*words], resilient_parsing=True)
    for name in words[:-1]:
        context = type(context)(VERBS[words], info_name=name, parent=context)
    context.terminal_width = 80
    out = VERBS[words].get_help(context)
    assert max(map(len, out.splitlines())) <= 80
    text = out.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    examples = [shlex.split(line) for line in text.splitlines() if "meditron" in line]
    assert examples, out
    for example in examples:
        start = next(i for i, word in enumerate(example) if "meditron" in word)
        if example[start : start + 2] == ["-m", "meditron_train"] or example[start] == "meditron_train":
            example = ["meditron-train", *example[start + 1 :]]
            start = 0
        called, arguments = (
            tuple(example[start + 1 : start + 1 + len(words)]),
            example[start + 1 + len(words) :],
        )
        assert called == words
        VERBS[words].make_context(words[-1], arguments)  # parses them, runs nothing
