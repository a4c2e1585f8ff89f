"""The reference pages that are made from the code: `python docs/generate.py` writes them.

`tests/test_docs_reference.py` fails when one of them is older than the code it describes.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from meditron_train import native
from meditron_train.cli.main import app
from meditron_train.config.schema import Config

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- Made by docs/generate.py from the code. Do not edit. -->\n\n"


def configuration_page() -> str:
    """Every key of a configuration file, from the pydantic models."""
    lines = [
        "# Configuration",
        "",
        "Every key of a configuration file, its type, default and meaning. On the command line a key is written",
        "`section.key=value`. `configs/schema.json` says the same to editors, which then complete and check.",
        "`null` stands for the default.",
    ]
    for name, field in Config.model_fields.items():
        lines += _section(field.alias or name, field)
    return "\n".join(lines) + "\n"


def _section(path: str, field: FieldInfo) -> Iterator[str]:
    model = _model_in(field.annotation)
    if model is None:
        yield from (
            "",
            f"## {path}",
            "",
            *textwrap.wrap(_text(field.description), 120),
            "",
            f"{_kind(field)}, default {_default(field)}",
        )
        return
    yield from ("", f"## {path}", "", *textwrap.wrap(_text(model.__doc__), 120), "")
    nested = []
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for name, entry in model.model_fields.items():
        key = entry.alias or name
        yield f"| `{key}` | {_kind(entry)} | {_default(entry)} | {_text(entry.description)} |"
        if _model_in(entry.annotation) is not None:
            nested.append((f"{path}.{key}", entry))
    for inner, entry in nested:
        yield from _section(inner, entry)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None`, `list[Model]` and the like."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def _kind(field: FieldInfo) -> str:
    return f"`{_kind_of(field.annotation)}`"


def _kind_of(annotation: Any) -> str:
    """How a type is written, without what limits its values: the meaning says that."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind_of(arguments[0])
    if origin is typing.Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind_of(argument) for argument in arguments if argument is not type(None))
    if origin is not None:
        inner = ", ".join("..." if argument is Ellipsis else _kind_of(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value: Any = field.default_factory()  # type: ignore[call-arg]
        if isinstance(value, BaseModel):
            return "see below"
    elif field.default is PydanticUndefined:
        return "required"
    else:
        value = field.default
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value, default=str)}`"


def _text(text: str | None) -> str:
    """One line, as a table's cell takes it."""
    words = " ".join((text or "").split())
    return re.sub(r"(?<!\\)([|<])", r"\\\1", words)


def command_page() -> str:
    """Every verb of `meditron-train` with its arguments and options."""
    command = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "`meditron-train VERB --help` says the same. Exit codes: 0 done, 1 failed or found a difference, 2 a mistake",
        "of the user, which the message names.",
    ]
    lines += _verbs(command, "meditron-train", typer.Context(command))
    return "\n".join(lines) + "\n"


def _verbs(command: Any, path: str, context: Any) -> Iterator[str]:
    for name, verb in getattr(command, "commands", {}).items():
        if getattr(verb, "commands", None):
            yield from _verbs(verb, f"{path} {name}", context)
            continue
        yield from ("", f"## {path} {name}", "", *_prose(verb.help or ""), "```text")
        usage = " ".join(verb.collect_usage_pieces(context))
        yield from (f"{path} {name} {usage}", "```", "")
        rows = list(_parameters(verb))
        if rows:
            yield from ("| argument or option | default | meaning |", "|---|---|---|", *rows)


def _prose(text: str) -> Iterator[str]:
    """Help text as Markdown: what is shown as it stands there goes into a block."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\b\n", "\b"))):
        if paragraph.startswith("\b"):
            yield from ("```text", paragraph.removeprefix("\b").rstrip(), "```", "")
        else:
            yield from (*textwrap.wrap(" ".join(paragraph.split()).replace("<", "\\<"), 120), "")


def _parameters(verb: Any) -> Iterator[str]:
    for parameter in verb.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        is_option = parameter.param_type_name == "option"
        names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
        shown = ", ".join(f"`{name}`" for name in names)
        default = "required" if parameter.required else _plain_default(parameter)
        yield f"| {shown} | {default} | {_text(getattr(parameter, 'help', ''))} |"


def _plain_default(parameter: Any) -> str:
    value = getattr(parameter.default, "value", parameter.default)
    if value is None or callable(value) or value in ((), []):
        return "–"
    return f"`{value}`".lower() if isinstance(value, bool) else f"`{value}`"


def native_page() -> str:
    """What `meditron_train.native` offers to other people's code."""
    lines = [
        "# Python API of the native core",
        "",
        *_cleaned(native.__doc__),
        "",
        "These names, the commands, the configuration and the formats on disk are what a change of version announces.",
        "Everything else may change.",
    ]
    for name in native.__all__:
        value = getattr(native, name)
        signature = re.sub(r"<[^>]+>", "...", str(inspect.signature(value))).replace("'", "")
        lines += ["", f"## {name}", "", "```python", f"{name}{signature}", "```", "", "```text"]
        lines += [*_cleaned(value.__doc__), "```"]
    return "\n".join(lines) + "\n"


def _cleaned(text: str | None) -> list[str]:
    return inspect.cleandoc(text or "").splitlines()


def pages() -> dict[str, str]:
    """File name below docs/reference -> its content."""
    made = {
        "configuration.md": configuration_page(),
        "command-line.md": command_page(),
        "native.md": native_page(),
    }
    return {name: _NOTE + text for name, text in made.items()}


if __name__ == "__main__":
    for file_name, content in pages().items():
        (REFERENCE / file_name).write_text(content, encoding="utf-8")
