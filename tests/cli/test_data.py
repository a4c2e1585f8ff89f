from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from meditron_train.cli.main import app
from tests.data.conftest import corpus_lines, sentencepiece_directory
from tests.data.test_trace import run

__all__ = ["corpus_lines", "run", "sentencepiece_directory"]  # fixtures


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "fever and pain"}\n{"body": ""}\nbad\n')
    return path


def test_tokenize_and_info(tmp_path: Path, source: Path, sentencepiece_directory: Path) -> None:
    prefix = tmp_path / "out"
    arguments = [
        "tokenize",
        source,
        "--tokenizer",
        sentencepiece_directory,
        "--output",
        prefix,
        "--workers",
        1,
    ]
    result = invoke(*arguments, "--text-key", "body", "--special-tokens", "[a],[b]", "--no-eos")
    assert result.exit_code == 0
    assert "1 documents" in result.stdout
    assert "1 empty documents and 1 bad lines left out" in result.stdout
    assert "in.jsonl, line 3: not JSON" in result.stderr

    info = json.loads(invoke("info", prefix, "--check", "--json").stdout)
    assert info["documents"] == 1
    assert info["meta"]["special_tokens"] == ["[a]", "[b]"]
    assert (info["meta"]["bos"], info["meta"]["eos"]) == (True, False)
    text = invoke("info", prefix).stdout
    assert f"sha256     {info['sha256']}" in text
    assert "documents  1" in text

    result = invoke(*arguments, "--text-key", "body")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    result = invoke(*arguments, "--text-key", "body", "--overwrite", "--strict")
    assert result.exit_code == 2
    assert "line 3: not JSON" in result.stderr


def test_output_that_cannot_be(tmp_path: Path, source: Path, sentencepiece_directory: Path) -> None:
    arguments = ["tokenize", source, "--tokenizer", sentencepiece_directory, "--text-key", "body"]
    for output, message in (
        (f"{tmp_path}/new/", "is a directory"),
        (source / "out", "Not a directory"),
        ("/proc/out", "cannot write into /proc/out.tokenizing"),
    ):
        result = invoke(*arguments, "--workers", 1, "--output", output)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_trace_is_strict_json(run: Path) -> None:
    prefix = run.parent / "a"
    Path(f"{prefix}.ids.jsonl").write_text("NaN\n" * 120)  # as earlier versions wrote it

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    found = json.loads(invoke("trace", run, "--step", 2, "--json").stdout, parse_constant=refuse)
    assert found["data_verified"] is False
    assert "NaN" in [row["id"] for row in found["segments"]]


def test_trace(run: Path) -> None:
    result = invoke("trace", run, "--step", 2, "--json")
    found = json.loads(result.stdout)
    assert found["step"] == 2
    row = found["segments"][0]
    assert set(row) == {"sample", "source", "document", "id", "start", "length"}
    lines = invoke("trace", run, "--step", 2).stdout.splitlines()
    assert lines[0] == "step 2: samples 4 to 7"
    assert len(lines) == 2 + len(found["segments"])
    assert lines[2].split()[:3] == [str(row["sample"]), row["source"], str(row["document"])]
    assert invoke("trace", run, "--step", 0).exit_code == 2
