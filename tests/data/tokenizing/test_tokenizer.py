from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from meditron_train.errors import UserError


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_directory")


def copy(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def grow(directory: Path, target: Path, tokens: list[str]) -> Path:
    """A copy of a tokenizer with special tokens added to it."""
    target.mkdir()
    copy_tokenizer(directory, target, tokens)
    return target


def test_sentencepiece_ids_are_sentencepieces(sentencepiece_directory: Path, corpus_lines: list[str]) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    for text in [*corpus_lines[:50], "", "  two  spaces ", "line\nbreak\ttab", "<s> literal </s>", "🙂"]:
        assert tokenizer.encode(text, bos=False, eos=False) == model.encode(text)
        assert tokenizer.encode(text) == [1, *model.encode(text), 2]


def test_hugging_face_ids_are_the_librarys(hugging_face_directory: Path, corpus_lines: list[str]) -> None:
    from tokenizers import Tokenizer as Backend

    tokenizer = load_tokenizer(hugging_face_directory)
    backend = Backend.from_file(str(hugging_face_directory / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (backend.get_vocab_size(), 0, 1)
    for text in corpus_lines[:50]:
        assert tokenizer.encode(text, bos=False, eos=False) == backend.encode(text).ids


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_survives(directory: Path, text: str) -> None:
    text = text.replace("\x00", "").replace("▁", "")  # to sentencepiece ▁ is a space
    tokenizer = cached(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@cache
def cached(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def test_literal_special_tokens_in_a_text_are_text(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, ["[bib]"])
    ids = tokenizer.encode("a<s>b</s>[bib]c", bos=False, eos=False)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
    assert ids.count(tokenizer.special_ids["[bib]"]) == 1
    assert tokenizer.decode(ids).replace(" ", "") == "a<s>b</s>[bib]c"


class TestSpecialTokens:
    def test_follow_the_vocabulary_in_order(self, directory: Path) -> None:
        base = load_tokenizer(directory)
        tokenizer = load_tokenizer(directory, ["[b]", "[a]"])
        assert tokenizer.special_ids == {"[b]": base.vocab_size, "[a]": base.vocab_size + 1}
        assert tokenizer.vocab_size == base.vocab_size + 2
        expected = [*base.encode("x", eos=False), base.vocab_size + 1, *base.encode("y", bos=False)]
        assert tokenizer.encode("x[a]y") == expected
        assert base.encode("x[a]y") != expected

    def test_the_longest_one_wins(self, directory: Path) -> None:
        tokenizer = load_tokenizer(directory, ["<|im|>", "<|im|>_end"])
        assert tokenizer.encode("<|im|>_end", False, False) == [tokenizer.special_ids["<|im|>_end"]]

    def test_known_ones_keep_their_id(self, directory: Path, tmp_path: Path) -> None:
        base = load_tokenizer(directory)
        tokenizer = load_tokenizer(directory, ["</s>", "[x]"])
        assert tokenizer.special_ids == {"</s>": base.eos_id, "[x]": base.vocab_size}
        grown = grow(directory, tmp_path / "grown", ["[x]", "[pad]"])
        tokenizer = load_tokenizer(grown, ["[y]", "[x]"])
        assert tokenizer.special_ids == {"[y]": base.vocab_size + 2, "[x]": base.vocab_size}
        assert tokenizer.vocab_size == base.vocab_size + 3
        assert tokenizer.decode([base.vocab_size + 1]) == "[pad]"

    @pytest.mark.parametrize("special_tokens", [["[a]", "[a]"], [""]])
    def test_must_be_distinct(self, directory: Path, special_tokens: list[str]) -> None:
        with pytest.raises(UserError, match="different and not empty"):
            load_tokenizer(directory, special_tokens)


class TestFingerprint:
    def test_covers_vocabulary_and_special_tokens(
        self, sentencepiece_directory: Path, hugging_face_directory: Path
    ) -> None:
        found = {
            load_tokenizer(sentencepiece_directory).fingerprint,
            load_tokenizer(hugging_face_directory).fingerprint,
            load_tokenizer(sentencepiece_directory, ["[a]", "[b]"]).fingerprint,
            load_tokenizer(sentencepiece_directory, ["[b]", "[a]"]).fingerprint,
        }
        assert len(found) == 4

    def test_added_in_the_files_or_by_config_is_the_same(self, directory: Path, tmp_path: Path) -> None:
        grown = grow(directory, tmp_path / "grown", ["[x]"])
        expected = load_tokenizer(directory, ["[x]"]).fingerprint
        assert load_tokenizer(grown, ["[x]"]).fingerprint == expected
        assert load_tokenizer(grown).fingerprint != expected  # there, a "[x]" in a text is text


def test_truncation_and_padding_of_the_file_are_ignored(hugging_face_directory: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(hugging_face_directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "aspirin lowers fever and pain in adults"
    expected = load_tokenizer(hugging_face_directory).encode(text, False, False)
    assert load_tokenizer(tmp_path).encode(text, False, False) == expected
    assert load_tokenizer(tmp_path).encode("", False, False) == []


class TestBadInput:
    def test_no_tokenizer(self, tmp_path: Path, sentencepiece_directory: Path) -> None:
        with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
            load_tokenizer(tmp_path)
        with pytest.raises(UserError, match="there is no directory"):
            load_tokenizer(tmp_path / "missing")
        with pytest.raises(UserError, match="give the directory it lies in"):
            load_tokenizer(sentencepiece_directory / "tokenizer.model")

    @pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
    def test_damaged_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"not a tokenizer")
        with pytest.raises(UserError, match=str(tmp_path)):
            load_tokenizer(tmp_path)

    def test_damaged_side_file(self, tmp_path: Path, sentencepiece_directory: Path) -> None:
        directory = copy(sentencepiece_directory, tmp_path / "a")
        for content, message in (("{", "not valid JSON"), ("[]", "JSON object")):
            (directory / "added_tokens.json").write_text(content)
            with pytest.raises(UserError, match=message):
                load_tokenizer(directory)

    @pytest.mark.parametrize(
        "name, content",
        [
            ("added_tokens.json", {"[x]": "400"}),
            ("added_tokens.json", {"[x]": -1}),
            ("added_tokens.json", {"[x]": {"id": 400}}),
        ],
        ids=str,
    )
    def test_added_tokens_of_the_wrong_shape(
        self, tmp_path: Path, sentencepiece_directory: Path, name: str, content: object
    ) -> None:
        directory = copy(sentencepiece_directory, tmp_path / "a")
        (directory / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{name} must be an object like"):
            load_tokenizer(directory)

    def test_no_bos(self, tmp_path: Path, hugging_face_directory: Path) -> None:
        shutil.copy(hugging_face_directory / "tokenizer.json", tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
        assert tokenizer.encode("fever", bos=False, eos=False)
        with pytest.raises(UserError, match=r'which of its tokens is BOS. Name it in .*"bos_token": "<s>"'):
            tokenizer.encode("fever", eos=False)
        assert tokenizer.adds_bos is None
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 5]}))
        assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (0, 1)
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 4000}))
        with pytest.raises(UserError, match="bos_token_id 4000"):
            load_tokenizer(tmp_path)

    def test_decode_outside_the_vocabulary(self, directory: Path) -> None:
        tokenizer = load_tokenizer(directory)
        for number in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match="outside 0"):
                tokenizer.decode([number])
