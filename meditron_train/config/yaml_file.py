"""YAML files that may come from anyone: plain data only, with bounds on size, nesting and number of values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from meditron_train.errors import UserError

_MAX_BYTES = 4 << 20
_MAX_VALUES = 100_000
# PyYAML looks a thousand characters ahead of every opening bracket: two thousand in a row take seconds to be refused.
_TOO_DEEP = re.compile(r"(?:[\[{]\s*){100}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as people write it: 3e-4 is a number, 1:30 is not (in base 60), and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(key, Hashable):
                problem = f"{key!r} cannot be a key"
            elif key in seen:
                problem = f"key {key!r} is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(rf"(?!.*:)(?:{found.pattern})", found.flags) if tag in _NUMBERS else found)
        for tag, found in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that a reader of YAML 1.1, or `_Loader`, would take for something else."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: Path, *, unescape: bool = False, example: str = "train: {steps: 1000}") -> dict[str, Any]:
    """The mapping in a YAML file that may come from anyone, with bounds on its size and number of values.

    Args:
        path: the file.
        unescape: `$${` becomes `${`, as in a file written by `dump_config`.
        example: what such a file may hold, for the message where it holds no mapping.

    Raises:
        UserError: the file cannot be read, or is not such a mapping; the message names the file.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; give the YAML file itself")
        with path.open("rb") as file:  # which may be a pipe
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES:,} bytes: it is not a configuration file")
    try:
        values = parse_yaml(text.replace("$${", "${") if unescape else text)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply, or one of its aliases contains itself") from None
    except yaml.YAMLError as error:
        hint = '\nInside { } or [ ], write quotes around ${VAR}: "${VAR}".' if "${" in text else ""
        raise UserError(f"{path} is not valid YAML: {error}{hint}") from None
    if _has_too_many(values):
        raise UserError(
            f"{path} has more than {_MAX_VALUES:,} values with its aliases written out, or one contains itself"
        )
    if not _is_unicode(values):
        raise UserError(f"{path} has half of a surrogate pair in a text, which no file or tokenizer can hold")
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} is {what}; expected keys and their values, as in `{example}`")
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain data only, by a SafeLoader.

    Raises:
        yaml.YAMLError: it is no YAML, or has a value that is not of the kind it says, such as the date 2001-99-99.
        RecursionError: it is nested too deeply, or an alias contains itself.
    """
    if _TOO_DEEP.search(text):
        raise RecursionError
    try:
        return yaml.load(text, _Loader)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:  # of PyYAML's constructors
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def dump_yaml(values: Any) -> str:
    """The text of plain data, for which `parse_yaml` gives an equal value."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _has_too_many(values: Any) -> bool:
    """A few lines of aliases of aliases stand for more values than there is memory."""
    return sum(1 for _ in itertools.islice(_every(values), _MAX_VALUES + 1)) > _MAX_VALUES


def _is_unicode(values: Any) -> bool:
    """Whether every text can be written; YAML's escapes may name half of a surrogate pair."""
    try:
        for value in _every(values):
            if isinstance(value, str):
                value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _every(values: Any) -> Iterator[Any]:
    """Every key and value inside."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
