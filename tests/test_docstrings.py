"""Docstrings have one form: a first line, prose, then the sections Args, Attributes, Returns, Yields and Raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "meditron_train"

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_HEADER = re.compile(r"^([A-Z]\w+(?: [a-z]\w+)?):\n(?=    \S)", re.MULTILINE)
_SECTION = re.compile(rf"^(?:{'|'.join(SECTIONS)}):\n(?:(?:    .*)?\n)+", re.MULTILINE)
_INLINE = re.compile(
    r"\b(?:Returns|Yields|Raises)\b"
    r"|\b[Rr]aises? (?:one |an? )?`?[A-Z]\w+"
    r"|(?:^|[.;:]\s)(?:[A-Z]\w*Error,|UserError\b)"
    r"|\b[A-Z]\w*(?:Error|Exception|Problem) (?:as|for|if|that|unless|when|where|with)\b"
)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def names_of(node: Documented) -> list[str]:
    """Arguments of a function; fields of a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    fields = [s.target for s in node.body if isinstance(s, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]


def problems_of(docstring: str, names: list[str], *, is_help: bool) -> Iterator[str]:
    """What is wrong with one docstring. `is_help`: the command line prints it, with sections of its own."""
    prose = _SECTION.sub("", docstring + "\n")
    if found := _INLINE.search(prose):
        yield f"{found.group()!r} stands in the prose: give it a section"
    for name in names:
        if re.search(rf"(?:^|[.;] )`?{name}`?: ", prose, re.MULTILINE):
            yield f"{name!r} is described in the prose: give it a line under Args or Attributes"
    for found in _HEADER.finditer(docstring):
        if found.group(1) not in SECTIONS and not is_help:
            yield f"{found.group(1)!r} is not a section: use {', '.join(SECTIONS)}"


def docstring_problems(package: Path) -> list[str]:
    problems = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
                line = node.body[0].lineno
                found = problems_of(docstring, names_of(node), is_help=where.parts[0] == "cli")
                problems += [f"{where}:{line}: {problem}" for problem in found]
    return problems


def test_the_package():
    problems = docstring_problems(ROOT)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ('"""A file. Raises OSError when it is missing."""', "'Raises' stands in the prose"),
        ('"""Raise UserError unless it is there."""', "'Raise UserError' stands in the prose"),
        ('"""A file. OSError when it is missing."""', "'OSError when' stands in the prose"),
        ('"""A file.\n\n    Returns the bytes.\n    """', "'Returns' stands in the prose"),
        ('"""A file.\n\n    path: of the file.\n    """', "'path' is described in the prose"),
        ('"""A file. `path`: of the file."""', "'path' is described in the prose"),
        ('"""A file.\n\n    Arguments:\n        path: of the file.\n    """', "'Arguments' is not a section"),
        (
            '"""A file.\n\n    Args:\n        path: of the file.\n\n    It raises OSError.\n    """',
            "'raises OSError' stands in the prose",
        ),
    ],
)
def test_planted_mistakes_are_found(tmp_path, docstring, said):
    (tmp_path / "a.py").write_text(f"def read(path):\n    {docstring}\n")
    problems = docstring_problems(tmp_path)
    assert len(problems) == 1
    assert said in problems[0]


def test_fields_of_a_class_have_a_section(tmp_path):
    text = '@dataclass\nclass File:\n    """A file. path: where it is."""\n\n    path: Path\n'
    (tmp_path / "a.py").write_text(text)
    assert len(docstring_problems(tmp_path)) == 1
    (tmp_path / "a.py").write_text(
        text.replace(" path: where", "\n\n    Attributes:\n        path: where", 1)
    )
    assert docstring_problems(tmp_path) == []


def test_what_is_allowed_passes(tmp_path):
    (tmp_path / "a.py").write_text(
        '''def read(path):
    """The bytes of a file; an error is raised again.

    Args:
        path: of the file.

    Returns:
        Bytes.

    Raises:
        OSError: the file is missing.

        ValueError: it is empty.
    """
'''
    )
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "read.py").write_text('"""Read.\n\nExamples:\n    read FILE\n"""\n')
    assert docstring_problems(tmp_path) == []
