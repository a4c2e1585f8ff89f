"""The fast encoder is exactly sentencepiece, or it is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from meditron_train.data.tokenizing import fast
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.fast import FastEncoderDiffersError, FastTokenizer, prove_fast
from meditron_train.data.tokenizing.journal import WorkDirectory
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.files import sha256_file
from tests.long import mostly_long

pytest.importorskip("gigatoken")

ODD = [
    "a <s> b </s>",
    "<unk>",
    "  two  spaces \n\n line\ttab",
    "naïve β 心臓 \x00",
    "▁ low ▁",
    " ",
    "<0x41>",
    "[fig] x [/fig]y",
]


@pytest.fixture
def texts(tmp_path: Path, corpus_lines: list[str]) -> Path:
    rng = random.Random(1)
    lines = [line + " " + rng.choice(ODD) for line in corpus_lines]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": line}) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.mark.parametrize("special", [(), ("[fig]", "[/fig]", "<s>")])
def test_gives_the_same_ids(
    sentencepiece_directory: Path, corpus_lines: list[str], special: tuple[str, ...]
) -> None:
    slow = load_tokenizer(sentencepiece_directory, special)
    quick = FastTokenizer(slow.definition)
    assert quick.fingerprint == slow.fingerprint
    for text in ODD + corpus_lines:
        quick.check(text)
        assert quick.encode(text) == slow.encode(text), text


@pytest.mark.parametrize("workers", mostly_long([1, 2], 1))
def test_gives_the_same_files(
    tmp_path: Path, sentencepiece_directory: Path, texts: Path, workers: int
) -> None:
    options = TokenizeOptions(str(sentencepiece_directory), ("[fig]", "[/fig]"))
    tokenize([texts], tmp_path / "slow", options)
    tokenize([texts], tmp_path / "fast", options, check_every=7, workers=workers)
    for suffix in (".bin", ".idx", ".ids.jsonl"):
        assert sha256_file(Path(f"{tmp_path}/slow{suffix}")) == sha256_file(Path(f"{tmp_path}/fast{suffix}"))


def test_a_difference_in_the_sample_leaves_it_unused(
    sentencepiece_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory)
    assert prove_fast(tokenizer, ["aspirin lowers fever"])
    assert not prove_fast(tokenizer, [])
    monkeypatch.setattr(fast.FastTokenizer, "_encode_part", lambda self, text: [5])
    with pytest.raises(FastEncoderDiffersError, match="begins 'aspirin"):
        FastTokenizer(tokenizer.definition).check("aspirin lowers fever")
    assert not prove_fast(tokenizer, ["aspirin lowers fever"])


def test_a_later_difference_starts_again_with_sentencepiece(
    tmp_path: Path, sentencepiece_directory: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    lines.sort(key=lambda line: len(line) % 5 == 0)  # the ones to be got wrong come last
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = TokenizeOptions(str(sentencepiece_directory))
    tokenize([texts], tmp_path / "slow", options)
    right, restart, restarts = FastTokenizer._encode_part, WorkDirectory.restart, []

    def wrong_later(self: FastTokenizer, text: str) -> list[int]:
        return [5] if len(text) % 5 == 0 else right(self, text)

    monkeypatch.setattr("meditron_train.data.tokenizing.tokenize._SAMPLE_DOCUMENTS", 3)
    monkeypatch.setattr(FastTokenizer, "_encode_part", wrong_later)
    monkeypatch.setattr(WorkDirectory, "restart", lambda self: (restarts.append(1), restart(self)))
    tokenize([texts], tmp_path / "fast", options, check_every=1)
    assert restarts == [1]
    assert sha256_file(tmp_path / "slow.bin") == sha256_file(tmp_path / "fast.bin")
    assert not Path(f"{tmp_path}/fast.tokenizing").exists()
