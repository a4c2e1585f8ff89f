"""Whatever is done with a tokenizer's files is done within bounds, and ids that are stated are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.tokenizer.complete import missing_files
from meditron_train.tokenizer.reading import encode, read_tokenizer
from meditron_train.tokenizer.versions import version_notes
from meditron_train.verify.compare_logits import probe_ids
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.checkpoint.tokenizer.shapes import byte_level
from tests.hostile import check
from tests.refusal import refused
from tests.tokenizer.test_reading import HOSTILE


def spoil(directory: Path, case: str) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    HOSTILE[case](content)
    (directory / "tokenizer.json").write_text(json.dumps(content))


def with_long_piece(directory: Path, length: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((directory / "tokenizer.model").read_bytes())
    proto.pieces.add(piece="a" * length, score=-1000.0)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())


def test_a_tokenizer_json_without_bounds_where_transformers_does_not_use_it(tmp_path: Path) -> None:
    """Its class makes a normalizer of its own, so that the reading is fine."""
    byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    spoil(tmp_path, "a normalizer that takes all memory")
    reading = read_tokenizer(tmp_path)
    if reading.transformers.startswith("4."):
        pytest.skip("4.x takes tokenizer.json as it stands")
    check(lambda: version_notes(tmp_path, reading))
    assert any("makes other ids of some texts" in note for note in version_notes(tmp_path, reading))


@pytest.mark.parametrize(
    "case", ["a normalizer that takes all memory", "post-processor with an unknown token", "no model"]
)
def test_logits_of_a_hostile_tokenizer(tmp_path: Path, case: str) -> None:
    byte_level(tmp_path)
    model = SimpleNamespace(max_position_embeddings=64, vocab_size=1000)
    side: Any = SimpleNamespace(hf_files=tmp_path, model=model)
    assert probe_ids(side).shape == (1, 64)
    spoil(tmp_path, case)

    def attempt() -> None:
        with refused(str(tmp_path)):
            probe_ids(side)

    check(attempt)


def test_ids_from_the_process_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "ka mo", "  é <|begin|>\n"):
        assert encode(tmp_path, text) == tokenizer.encode(text)


@pytest.mark.parametrize("use", [read_tokenizer, missing_files, load_tokenizer], ids=lambda use: use.__name__)
def test_a_piece_without_end(tmp_path: Path, use: Any) -> None:
    write_tokenizer_model(tmp_path)
    with_long_piece(tmp_path, 1_000_000)

    def attempt() -> None:
        with refused("tokenizer.model has a piece of 1000000 characters"):
            use(tmp_path)

    check(attempt)


def test_a_piece_without_end_beside_a_whole_tokenizer(tmp_path: Path) -> None:
    """tokenizer.json is the tokenizer then."""
    write_tokenizer_model(tmp_path / "source")
    (tmp_path / "whole").mkdir()
    copy_tokenizer(tmp_path / "source", tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole").definition.sentencepiece == "always"
    with_long_piece(tmp_path / "whole", 1_000_000)
    check(lambda: load_tokenizer(tmp_path / "whole"))
    assert load_tokenizer(tmp_path / "whole").definition.sentencepiece == "never"


@pytest.mark.parametrize(
    ("stated", "wrong"),
    [
        ({"<pad>": VOCAB_SIZE}, None),
        ({"<pad>": VOCAB_SIZE, "<sep>": VOCAB_SIZE + 1}, None),
        ({"<sep>": VOCAB_SIZE + 1, "<pad>": VOCAB_SIZE}, None),
        ({"<pad>": VOCAB_SIZE + 1}, ("<pad>", VOCAB_SIZE + 1, VOCAB_SIZE)),
        ({"<pad>": VOCAB_SIZE, "<sep>": VOCAB_SIZE + 2}, ("<sep>", VOCAB_SIZE + 2, VOCAB_SIZE + 1)),
        ({"<pad>": 3}, ("<pad>", 3, VOCAB_SIZE)),
        ({"</s>": 2}, None),
        ({"</s>": 7}, ("</s>", 7, 2)),
    ],
    ids=str,
)
def test_stated_ids_are_kept_or_refused(
    tmp_path: Path, stated: dict[str, int], wrong: tuple[str, int, int] | None
) -> None:
    write_tokenizer_model(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(stated))
    if wrong is None:
        reading = read_tokenizer(tmp_path)
        assert {token: reading.vocabulary[token] for token in stated} == stated
        return
    token, number, made = wrong
    for use in (read_tokenizer, missing_files, load_tokenizer):
        with refused(f"says that {token!r} has the id {number}", f"it gets {made}"):
            use(tmp_path)
