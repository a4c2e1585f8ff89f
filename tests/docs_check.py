"""Checks that README.md and docs/*.md tell the truth about commands and files. `make docs-check` runs it.

For every command in a ```bash block: verbs and options of meditron-train must exist, configurations and their
overrides must load, make targets, scripts and modules must exist. A block after `<!-- docs-check: run -->` is
also executed. For the text: relative links, and `paths/in/backticks` that start with a directory of this
repository, must exist. Words in CAPITALS, <like this> and ... are placeholders. Prose fits into 120 columns.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from meditron_train.cli.main import app
from meditron_train.config.load import load_config
from meditron_train.errors import UserError

RUN_MARK = "<!-- docs-check: run -->"
RUN_TIMEOUT_S = 300
MAX_WIDTH = 120
_PLACEHOLDER = re.compile(r"[<>{}*$…]|\.\.\.|\b[A-Z][A-Z0-9_]{2,}\b")
_HERE_DOCUMENT = re.compile(r"<<'?(?P<end>\w+)'?$")
_WRITTEN = re.compile(r"> (\S+\.ya?ml) <<")
_SEPARATORS = {"&&", "||", ";", "|", "&"}
# Programs of other people whose arguments are theirs.
_FOREIGN = {
    *("git", "cd", "pip", "source", "export", "curl", "tar", "echo", "trap", "wait", "module"),
    *("kill", "ls", "cat", "tail", "head", "mkdir", "cp", "mv", "rm", "du", "df", "watch", "jq", "column"),
    *("docker", "scontrol", "squeue", "sacct", "sinfo", "scancel", "salloc", "nvidia-smi"),
    *("tensorboard", "wandb", "pre-commit", "huggingface-cli", "hf"),
    *("openssl", "model_signing"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands: where it starts, what it says, whether it is to be run."""

    file: Path
    line: int
    text: str
    run: bool


def documents(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.is_file()]


def blocks(file: Path) -> Iterator[Block]:
    """The ```bash, ```sh and ```console blocks of a Markdown file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    fence: str | None = None
    start, marked = 0, False
    for number, line in enumerate(lines):
        stripped = line.strip()
        if fence is None and stripped.startswith("```"):
            fence, start = stripped[3:].split(" ")[0], number + 1
            marked = any(previous.strip() == RUN_MARK for previous in lines[max(0, number - 2) : number])
        elif fence is not None and stripped == "```":
            if fence in ("bash", "sh", "console"):
                yield Block(file, start + 1, "\n".join(lines[start:number]), marked)
            fence = None


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of each command of a block; of a console block, those after `$ `."""
    text = block.text
    if re.search(r"^\s*\$ ", text, re.MULTILINE):
        text = "\n".join(
            line.strip()[2:] if line.strip().startswith("$ ") else "" for line in text.splitlines()
        )
    pending, first = "", 0
    here_document_ends = None
    for offset, line in enumerate(text.splitlines()):
        if here_document_ends is not None:
            here_document_ends = None if line == here_document_ends else here_document_ends
            continue
        if opened := _HERE_DOCUMENT.search(line):
            here_document_ends = opened["end"]
            line = line[: opened.start()]
        first = first if pending else block.line + offset
        pending += line.removesuffix("\\") + " "
        if line.endswith("\\"):
            continue
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word not in _SEPARATORS:
                words.append(word)
            elif words:
                yield first, words
                words = []
        if words:
            yield first, words
        pending = ""


def command_problem(words: list[str], root: Path) -> str | None:
    """What is wrong with one command line, or None."""
    while words and re.match(r"^[A-Za-z_][A-Za-z0-9_]*=", words[0]):
        words = words[1:]
    if not words or words[0] in _FOREIGN:
        return None
    program, arguments = words[0], words[1:]
    if program in ("meditron-train", ".venv/bin/meditron-train"):
        return cli_problem(arguments, root)
    if program in ("srun", "torchrun", "exec", "time", "nohup"):
        return launched_problem(program, arguments, root)
    if program in ("python", "python3", ".venv/bin/python"):
        return python_problem(arguments, root)
    if program == "make":
        targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
        unknown = [target for target in targets if target not in make_targets(root)]
        return f"the Makefile has no target {', '.join(unknown)}" if unknown else None
    if program in ("sbatch", "bash", "sh", "pytest"):
        files = [word.split("::")[0] for word in arguments if "/" in word and not _PLACEHOLDER.search(word)]
        missing = [word for word in files if "=" not in word and not (root / word).exists()]
        return f"there is no {', '.join(missing)}" if missing else None
    if "/" in program and (root / program).exists():
        return None
    return f"unknown program {program!r}"


def python_problem(arguments: list[str], root: Path) -> str | None:
    if arguments[:2] == ["-m", "meditron_train"]:
        return cli_problem(arguments[2:], root)
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        module = arguments[1]
        here = root / module.replace(".", "/")
        known = (
            here.with_suffix(".py").exists()
            or here.is_dir()
            or importlib.util.find_spec(module.split(".")[0])
        )
        return None if known else f"there is no module {module}"
    if arguments and arguments[0].endswith(".py") and not (root / arguments[0]).exists():
        return f"there is no {arguments[0]}"
    return None


def launched_problem(launcher: str, arguments: list[str], root: Path) -> str | None:
    """A command behind srun or torchrun: whatever follows the launcher's own options."""
    for position, word in enumerate(arguments):
        if word == "-m" and arguments[position + 1 : position + 2] == ["meditron_train"]:
            return cli_problem(arguments[position + 2 :], root)
        if word == "meditron-train":
            return cli_problem(arguments[position + 1 :], root)
        if word == "torchrun":
            return launched_problem(word, arguments[position + 1 :], root)
    return f"{launcher} starts no meditron_train"


def make_targets(root: Path) -> set[str]:
    text = (root / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def cli_problem(arguments: list[str], root: Path) -> str | None:
    """Parse the words against the real command tree, then load the configuration they name."""
    return parse_problem(typer.main.get_command(app), arguments) or config_problem(arguments, root)


def config_problem(arguments: list[str], root: Path) -> str | None:
    """Configurations named on a command line must exist; those of `train` must load with their overrides."""
    for position, word in enumerate(arguments):
        if not word.endswith((".yaml", ".yml")) or _PLACEHOLDER.search(word):
            continue
        if not (root / word).is_file():
            return f"there is no {word}"
        if arguments[0] == "train":
            overrides = [
                other
                for before, other in pairwise(arguments[position:])
                if not other.startswith("-") and before != "--processes"
            ]
            try:
                load_config(root / word, overrides)
            except UserError as error:
                return str(error)
    return None


def parse_problem(command: Any, arguments: list[str]) -> str | None:
    """Verbs, options and the number of arguments, without running anything or asking whether files exist."""
    try:
        context = command.make_context(command.name, list(arguments))
    except typer.Exit:  # --help, --version
        return None
    except Exception as error:  # Typer carries its own copy of click: there is no class to name
        message = _message(error)
        return None if "does not exist" in message else message
    if not hasattr(command, "resolve_command"):
        return None
    rest = [*context._protected_args, *context.args]
    if not rest:
        return "a verb is missing"
    try:
        _, verb, rest = command.resolve_command(context, rest)
    except Exception as error:
        return _message(error)
    return parse_problem(verb, rest)


def _message(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    return (format_message() if format_message else str(error)).replace("\n", " ")


def text_problems(file: Path, root: Path) -> Iterator[str]:
    """Relative links and paths in backticks that lead nowhere; modules may be named from the package on."""
    top_level = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    top_level -= {"runs", "build", "dist"}  # made by commands, not part of the repository
    inside = False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip().startswith("```"):
            inside = not inside
        if inside:
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", line):
            if (
                "://" not in target
                and not target.startswith("mailto:")
                and not (file.parent / target).exists()
            ):
                yield f"{file.relative_to(root)}:{number}: the link leads nowhere: {target}"
        for span in re.findall(r"`([^`\s]+)`", line):
            path = span.split("::")[0].rstrip("/").split(":")[0]
            is_ours = path.split("/")[0] in top_level or path.endswith(".py")
            is_path = "/" in span and is_ours and not _PLACEHOLDER.search(path)
            if is_path and not any((above / path).exists() for above in (root, root / "meditron_train")):
                yield f"{file.relative_to(root)}:{number}: there is no {path}"


def long_lines(file: Path, root: Path) -> Iterator[str]:
    """Lines of prose that are wider than the page. Tables, headings and code are as wide as they must be."""
    in_code = False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        if len(line) > MAX_WIDTH and not in_code and not line.lstrip().startswith(("|", "#")):
            yield f"{file.relative_to(root)}:{number}: {len(line)} columns are more than {MAX_WIDTH}"


def run_problem(block: Block, root: Path) -> str | None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    if done.returncode == 0:
        return None
    return f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"


def prose_problems(root: Path) -> list[str]:
    """What is wrong with the text between the commands, in CHANGELOG.md and CONTRIBUTING.md its width alone."""
    problems = [problem for file in documents(root) for problem in text_problems(file, root)]
    for file in (*documents(root), *sorted(root.glob("C*.md"))):
        problems += long_lines(file, root)
    return problems


def check(root: Path, *, run: bool = True) -> list[str]:
    """Everything wrong with the documents below `root`; with `run`, marked blocks are run, too."""
    problems = []
    for file in documents(root):
        written = set(_WRITTEN.findall(file.read_text(encoding="utf-8")))
        for block in blocks(file):
            where = block.file.relative_to(root)
            for line, words in commands(block):
                if words[0] == "meditron-train" and (block.run or written.intersection(words)):
                    # Its files are made by the page: running it is the check of those.
                    problem = parse_problem(typer.main.get_command(app), words[1:])
                else:
                    problem = None if block.run else command_problem(words, root)
                if problem:
                    problems.append(f"{where}:{line}: `{shlex.join(words)}`: {problem}")
            if run and block.run and (problem := run_problem(block, root)):
                problems.append(f"{where}:{block.line}: {problem}")
    return problems + prose_problems(root)


if __name__ == "__main__":
    repository = Path(__file__).parents[1]
    found = check(repository)
    print(
        "\n".join(found) or f"{len(documents(repository))} documents: every command and file they name exists"
    )
    sys.exit(1 if found else 0)
