"""One style of messages: a lower-case start, names aside, and no full stop at the end."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "meditron_train"
# Words that keep their capital: names, abbreviations and environment variables.
NAME = re.compile(
    r"[A-Z0-9_&]{2,}|[A-Z]\w*[A-Z]\w*|(Megatron|Slurm|Llama|Hugging|Parquet|Python|Ctrl|Transformer)\b"
)


def message_ends(expression: ast.expr) -> tuple[str, str]:
    """The literal texts with which a message begins and ends; "" for one that is computed."""
    if isinstance(expression, ast.Constant):
        return str(expression.value), str(expression.value)
    if isinstance(expression, ast.JoinedStr):
        ends = [part.value if isinstance(part, ast.Constant) else "" for part in expression.values]
        return ends[0], ends[-1]
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        return message_ends(expression.left)[0], message_ends(expression.right)[1]
    return "", ""


def messages(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, beginning and end of what a source file raises or logs."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = ast.unparse(node.func)
        if called.endswith("Error") or re.fullmatch(r"_?log\.(info|warning|error)", called):
            yield node.lineno, *message_ends(node.args[0])


def faults(source: str) -> list[str]:
    found = []
    for line, beginning, end in messages(source):
        if beginning[:1].isupper() and not NAME.match(beginning):
            found.append(f"line {line}: begins with a capital: {beginning[:40]!r}")
        if end.endswith(".") and not end.endswith("..."):
            found.append(f"line {line}: ends with a full stop: {end[-40:]!r}")
    return found


def test_messages_have_one_style():
    assert [
        f"{path.name}: {fault}" for path in ROOT.rglob("*.py") for fault in faults(path.read_text())
    ] == []


def test_the_check_sees_both_faults_and_lets_names_pass():
    assert faults('raise UserError(f"No file {path}: copy it.")') == [
        "line 1: begins with a capital: 'No file '",
        "line 1: ends with a full stop: ': copy it.'",
    ]
    assert faults('_log.info("W&B is off")\nraise UserError("PDF files need " + what)') == []
