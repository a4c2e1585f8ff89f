"""`meditron-train config`: presets, the schema, and configurations from Megatron's arguments; `launch-scripts`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from meditron_train.errors import UserError
from meditron_train.files import replace_text, shipped

app = typer.Typer(help="Presets, and configurations made from Megatron's arguments.", no_args_is_help=True)


def _presets() -> dict[str, Path]:
    """Name -> file; those of `corpus build` are named corpus/NAME."""
    root = shipped("configs")
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def _preset(name: str) -> Path:
    presets = _presets()
    found = presets.get(name.removesuffix(".yaml"))
    if found is None:
        raise UserError(f"there is no preset {name!r}; there are {', '.join(presets)}")
    return found


@app.command("list")
def list_() -> None:
    """The presets, with what each is for.

    \b
    Examples:
      meditron-train config list
    """
    for name, path in _presets().items():
        comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        about = next((line[2:] for line in comments if "yaml-language-server" not in line), "")
        typer.echo(f"{name:<28}{about}")


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A preset, or schema.")]) -> None:
    """Print a preset, or the JSON Schema of a configuration file (schema).

    \b
    Examples:
      meditron-train config show meditron-7b
      meditron-train config show schema
    """
    path = shipped("configs") / "schema.json" if name == "schema" else _preset(name)
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The preset to begin with.")],
    output: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The file to write.")],
) -> None:
    """Write a preset into a file of your own, and the schema beside it for your editor.

    \b
    Examples:
      meditron-train config init llama2-7b run.yaml
    """
    if output.exists():
        raise UserError(f"{output} is there already: give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, _preset(name).read_text(encoding="utf-8"))
    schema = output.parent / "schema.json"
    if not schema.exists():
        replace_text(schema, (shipped("configs") / "schema.json").read_text(encoding="utf-8"))
    typer.echo(str(output))


@app.command(
    "from-megatron", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def from_megatron(
    arguments: Annotated[
        list[str], typer.Argument(metavar="ARGS...", help="As Megatron's script gets them: --name value ...")
    ],
) -> None:
    """Print the configuration that says what arguments of Megatron-LM or Megatron-LLM say.

    What is always so here, and what has no equal, follows as comments.

    \b
    Examples:
      meditron-train config from-megatron \\
          --tensor-model-parallel-size 8 --seq-length 4096 --lr 3e-4
    """
    from meditron_train.config.yaml_file import dump_yaml
    from meditron_train.flows.migrate import migrate

    result = migrate(arguments)
    typer.echo(dump_yaml(result.values), nl=False)
    for title, lines in (
        ("Look at", result.notes),
        ("Always so here, or decided elsewhere", result.already),
        ("Without an equal here", result.without_equal),
    ):
        if lines:
            typer.echo("\n".join(["", f"# {title}:", *(f"#   {line}" for line in lines)]))


def launch_scripts(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to write them into.")],
) -> None:
    """Write the launch scripts for Slurm and for one machine into a directory; files of the same name are kept.

    \b
    Examples:
      meditron-train launch-scripts launch
    """
    source = shipped("launch")
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for path in source.iterdir() if path.is_file() and path.name != "cluster.env"):
        target = directory / path.name
        if target.exists():
            typer.echo(f"kept     {target}")
        else:
            shutil.copy2(path, target)
            typer.echo(f"written  {target}")
