"""Configuration files: read YAML, fill in the environment, apply overrides, and report every mistake at once.

Order: parse the file, apply `section.field=value` overrides, replace `${VAR}` and `${VAR:-default}`, drop
nulls (null means the default), validate. An interpolated value is text that the key's type converts; `$${` is
a literal `${`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from meditron_train.config.schema import Config
from meditron_train.config.section import Section
from meditron_train.config.yaml_file import dump_yaml, parse_yaml, read_yaml
from meditron_train.errors import UserError
from meditron_train.files import replace_text

_COMMAND_LINE = "the command line"
_VARIABLE = re.compile(r"(?P<escape>\$)?\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|\$\{")
_Root = TypeVar("_Root", bound=Section)
_FREE_FORM = ("model", "hf_config")  # Hugging Face's own keys, where null carries meaning


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a configuration file.

    Args:
        path: the YAML file.
        overrides: `section.field=value` strings, their values in YAML, and `section=@FILE` for the keys that the
            same section of another file has.

    Raises:
        UserError: lists everything wrong with the file and the overrides: unknown keys with the nearest valid
            one, values of the wrong kind, undefined environment variables.
    """

    def add_defaults(values: dict[str, Any]) -> None:
        logging_section = values.setdefault("logging", {})
        if isinstance(logging_section, dict):
            logging_section.setdefault("run_dir", f"runs/{Path(path).stem}")

    return _load(Path(path), Config, overrides, add_defaults)


def load_section(path: Path | str, root: type[_Root]) -> _Root:
    """The same for a file of another kind, whose top level is the section `root`."""
    return _load(Path(path), root, (), lambda values: None)


def load_overrides(overrides: Sequence[str], root: type[_Root]) -> _Root:
    """A `root` of `section.field=value` strings alone, without a file.

    Raises:
        UserError: lists everything wrong with them.
    """
    return _checked({}, root, overrides, lambda values: None, _COMMAND_LINE)


def _load(
    path: Path, root: type[_Root], overrides: Sequence[str], add_defaults: Callable[[dict[str, Any]], None]
) -> _Root:
    return _checked(read_yaml(path), root, overrides, add_defaults, str(path))


def _checked(
    values: dict[str, Any],
    root: type[_Root],
    overrides: Sequence[str],
    add_defaults: Callable[[dict[str, Any]], None],
    where: str,
) -> _Root:
    problems: list[str] = []
    try:
        overridden = _apply_overrides(values, overrides, problems)
        values = _interpolate(values, (), overridden, problems)
        values = _drop_nulls(values, ())
    except RecursionError:
        raise UserError(f"{where} is nested too deeply, or one of its aliases contains itself") from None
    add_defaults(values)
    config: _Root | None = None
    try:
        config = root.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            # A list whose entries fail is also reported as too short: say the first reason only.
            if problem["type"] != "too_short" or not problem["input"]:
                problems.append(_explain(dict(problem), overridden, root))
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{where}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def dump_config(config: Section, path: Path) -> None:
    """Write a resolved configuration atomically; `load_config` or `load_section` of that file gives an equal one."""
    values = config.model_dump(mode="json", by_alias=True)
    text = dump_yaml(values).replace("${", "$${")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> set[str]:
    """Set each `a.b.c=value` and `section=@FILE` in `values`; returns the dotted keys that were set."""
    overridden: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        parts = key.split(".")
        if key and len(parts) == 1 and text.startswith("@"):
            if trouble := _take_section(values, key, Path(text[1:])):
                problems.append(f"{override!r} on {_COMMAND_LINE}: {trouble}")
            continue
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(
                f"{override!r} on {_COMMAND_LINE}: expected section.field=value, as train.steps=1000, "
                "or section=@FILE, as data=@data.yaml"
            )
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            problems.append(f"{override!r} on {_COMMAND_LINE}: the value is not valid YAML")
            continue
        trouble = _set(values, parts, value)
        if trouble:
            problems.append(f"{override!r} on {_COMMAND_LINE}: {trouble}")
        else:
            overridden.add(key)
    return overridden


def _take_section(values: dict[str, Any], section: str, path: Path) -> str | None:
    """Put the keys of a section of another file over those of `values`; returns what prevents it."""
    found = read_yaml(path).get(section)
    here = values.setdefault(section, {})
    if not isinstance(found, dict) or not isinstance(here, dict):
        return f"{path if not isinstance(found, dict) else 'the configuration'} has no section {section}"
    here.update(found)
    return None


def _set(values: Any, parts: list[str], value: Any) -> str | None:
    """Set values[parts[0]][parts[1]]... (numbers index lists); returns what prevents it."""
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[:depth])
        if isinstance(values, list):
            if not (part.isdigit() and int(part) < len(values)):
                return f"{here} has {len(values)} entries, numbered from 0, and no entry {part!r}"
            index: Any = int(part)
        elif isinstance(values, dict):
            index = part
        else:
            return f"{here} is {values!r} and has no key {part!r}"
        if last:
            values[index] = value
        else:
            if isinstance(values, dict) and values.get(index) is None:
                values[index] = {}
            values = values[index]
    return None


def _interpolate(value: Any, keys: tuple[Any, ...], overridden: set[str], problems: list[str]) -> Any:
    """Replace ${VAR} and ${VAR:-default} in every string below `value`."""
    if isinstance(value, dict):
        return {k: _interpolate(v, (*keys, k), overridden, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_interpolate(v, (*keys, i), overridden, problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["escape"]:
            return match[0][1:]
        if name is None:
            problems.append(
                f"{_where(keys, overridden)} = {value!r}: write ${{NAME}} or ${{NAME:-default}}, "
                "or $${ for a plain ${"
            )
            return match[0]
        found = os.environ.get(name) or default  # as in the shell, :- also replaces an empty variable
        if found is None:
            problems.append(
                f"{_where(keys, overridden)} = {value!r}: the environment variable {name} is not set; "
                f"export {name}=..., or write ${{{name}:-default}}"
            )
            return match[0]
        return found

    return _VARIABLE.sub(replacement, value)


def _drop_nulls(value: Any, keys: tuple[Any, ...]) -> Any:
    if keys == _FREE_FORM:
        return value
    if isinstance(value, dict):
        return {k: _drop_nulls(v, (*keys, k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_drop_nulls(v, (*keys, i)) for i, v in enumerate(value)]
    return value


def _where(keys: Sequence[Any], overridden: set[str]) -> str:
    dotted = ".".join(map(str, keys))
    ours = any(dotted == key or dotted.startswith(key + ".") for key in overridden)
    return f"{dotted} (from {_COMMAND_LINE})" if ours else dotted


def _explain(problem: dict[str, Any], overridden: set[str], root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: key, value, what is expected."""
    keys = problem["loc"]
    where = _where(keys, overridden) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggest(keys, root)}"
    if problem["type"] == "too_short":
        return f"{where}: at least one entry is needed"
    if problem["type"] == "model_type":
        return f"{where} = {problem['input']!r}: expected a section, that is keys and their values"
    if problem["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = problem["msg"]
    for prefix in ("Value error, ", "Input should be "):
        if message.startswith(prefix):
            message = message.removeprefix(prefix)
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{where}: {message}"  # the mistake is between keys; the message names them
    expected = message if problem["type"] == "value_error" else f"expected {message}"
    return f"{where} = {problem['input']!r}: {expected}"


def _suggest(keys: Sequence[Any], root: type[BaseModel]) -> str:
    """The nearest valid key: among the neighbors first, then the same word in another section."""
    parent: type[BaseModel] | None = root
    for key in keys[:-1]:
        if parent is not None and not isinstance(key, int):
            parent = _nested(parent, key)
    wrong = str(keys[-1])
    prefix = ".".join(map(str, keys[:-1]))
    siblings = _keys_of(parent) if parent else []
    everywhere = dict.fromkeys(_all_keys(root, ""))
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == wrong]
    close = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    leaves = {key.rpartition(".")[2]: key for key in everywhere}
    close = difflib.get_close_matches(wrong, list(leaves), n=1, cutoff=0.75)
    if close:
        return f"did you mean {leaves[close[0]]}?"
    return f"valid keys in {prefix or 'the file'}: {', '.join(siblings)}"


def _keys_of(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _nested(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section class behind a key, also through `X | None` and `tuple[X, ...]`."""
    for name, field in section.model_fields.items():
        if key == (field.alias or name):
            return next(_sections_in(field.annotation), None)
    return None


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)


def _all_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key in _keys_of(section):
        yield prefix + key
        nested = _nested(section, key)
        if nested is not None:
            yield from _all_keys(nested, f"{prefix}{key}.")
