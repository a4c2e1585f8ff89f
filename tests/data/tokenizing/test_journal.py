from __future__ import annotations

import json
from pathlib import Path

import pytest

from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.errors import UserError
from tests.refusal import refused


@pytest.fixture
def options(sentencepiece_directory: Path) -> TokenizeOptions:
    return TokenizeOptions(tokenizer=str(sentencepiece_directory), chunk_bytes=1500)


@pytest.fixture
def source(tmp_path: Path, corpus_lines: list[str]) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_lines))
    return path


@pytest.mark.parametrize(
    "output",
    ["/proc/out", "/proc/a/out", "{0}/file/out", "{0}/file/a/out", "{0}/blocked", "{0}/" + "x" * 300],
)
def test_output_that_cannot_be_written(
    tmp_path: Path, source: Path, options: TokenizeOptions, output: str
) -> None:
    output = output.format(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "blocked.tokenizing").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write (in)?to .* \(.*: give another --output"):
        tokenize([source], output, options)
    assert (tmp_path / "blocked.tokenizing").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[" * 100_000, '{"settings": []}', '{"settings": {"options": 1}}',
     '{"settings": {"options": {}, "vocabulary": "", "sources": []}, "publishing": true, "progress": [1]}'],
)  # fmt: skip
def test_a_state_that_no_run_left(
    tmp_path: Path, source: Path, options: TokenizeOptions, content: str
) -> None:
    (tmp_path / "out.tokenizing").mkdir()
    (tmp_path / "out.tokenizing" / "state.json").write_text(content)
    with refused("state.json is not what an interrupted run leaves", "--overwrite"):
        tokenize([source], tmp_path / "out", options)
    tokenize([source], tmp_path / "out", options, overwrite=True)
    assert not (tmp_path / "out.tokenizing").exists()


def test_output_is_a_directory(tmp_path: Path, source: Path, options: TokenizeOptions) -> None:
    for output in (tmp_path, f"{tmp_path}/", f"{tmp_path}/new/", "", "."):
        with pytest.raises(UserError, match="is a directory: give the beginning of the files' names"):
            tokenize([source], output, options)
    (tmp_path / "out.ids.jsonl").mkdir()
    with pytest.raises(UserError, match=r"out\.ids\.jsonl is a directory: give another --output"):
        tokenize([source], tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.ids.jsonl"]


def test_nothing_is_left_when_there_is_nothing_to_continue(
    tmp_path: Path, source: Path, options: TokenizeOptions
) -> None:
    with open(source, "a") as file:
        file.write("bad\n")
    with pytest.raises(UserError, match="line 301"):
        tokenize([source], tmp_path / "out", options, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(UserError, match="line 301"):
        tokenize([source], tmp_path / "out", options, strict=True, save_interval_s=0)
    assert (tmp_path / "out.tokenizing" / "state.json").is_file()
    with pytest.raises(UserError, match="line 301"):
        tokenize([source], tmp_path / "out", options, strict=True)
    assert (tmp_path / "out.tokenizing" / "state.json").is_file()
