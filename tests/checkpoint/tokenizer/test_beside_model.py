"""The copy of a tokenizer directory means to transformers what the source means."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from meditron_train.checkpoint.tokenizer.beside_model import (
    check_tokenizer,
    compare_fingerprints,
    compare_tokenizers,
    copy_tokenizer,
    tokenizer_fingerprint,
)
from meditron_train.tokenizer.complete import missing_files
from meditron_train.tokenizer.files import tokenizer_files
from tests.checkpoint.tiny_llama import change_json
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, awkward_texts, generated_texts, write_tokenizer_model
from tests.checkpoint.tokenizer.shapes import SHAPES, llama
from tests.long import mostly_long
from tests.refusal import refused

TEXTS = [
    *generated_texts(40, seed=5),
    *awkward_texts(100),
    *(f"  {text}" for text in generated_texts(20, seed=6)),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer_model(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


QUICK = (
    "tokenizer.model alone",
    "Llama 2",
    "added tokens",
    "byte level",
    "vocab.json and merges.txt",
    "templates and named tokens",
    "saved with added tokens",
)


@pytest.fixture(params=mostly_long(SHAPES, *QUICK))
def shape(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "shape"
    directory.mkdir()
    SHAPES[request.param](directory)
    return directory


def load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def facts(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """What transformers makes of a tokenizer, field by field."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(numbers) for numbers in ids],
        "skipped": [tokenizer.decode(numbers, skip_special_tokens=True) for numbers in ids],
        "vocabulary": tokenizer.get_vocab(),
        "names": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "flags": {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "template": tokenizer.chat_template,
        "inputs": tokenizer.model_input_names,
        "limit": tokenizer.model_max_length,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
    }


def test_every_shape_is_copied_and_means_the_same(shape: Path, target: Path) -> None:
    assert copy_tokenizer(shape, target)
    for name, path in tokenizer_files(shape).items():
        assert (target / name).read_bytes() == path.read_bytes(), name
    assert compare_tokenizers(shape, target) == []
    assert compare_fingerprints(tokenizer_fingerprint(shape), tokenizer_fingerprint(target)) == []
    if missing_files(shape):
        return  # tokenizer.model alone: compared with sentencepiece below
    before, after = load(shape), load(target)
    around = [f"a {t} b{t}{t}\n{t} x" for t in (*before.all_special_tokens, *before.get_added_vocab())]
    assert facts(before, TEXTS + around) == facts(after, TEXTS + around)


def test_special_tokens_are_added_to_every_shape(shape: Path, target: Path) -> None:
    """In place: what the source's files say otherwise stands in the target's too."""
    size = tokenizer_fingerprint(shape)["num_tokens"]
    copy_tokenizer(shape, target, ["<|first|>", "<|second|>"])
    tokenizer = load(target)
    assert tokenizer.convert_tokens_to_ids(["<|first|>", "<|second|>"]) == [size, size + 1]
    ids = tokenizer.encode("a<|second|>b", add_special_tokens=False)
    assert ids.count(size + 1) == 1
    assert tokenizer.decode([size], skip_special_tokens=True) == ""
    for name, path in tokenizer_files(shape).items():
        if name.endswith("config.json"):
            given, written = (json.loads(file.read_text()) for file in (path, target / name))
            for settings in (given, written):
                settings.pop("added_tokens_decoder", None)
            assert written == given


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": "<|sep|>,<|x|>", "pad_id": 3},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
    ids=["llama", "user-symbols", "nmt_nfkc", "no-dummy-prefix"],
)
def test_tokenizer_model_alone_means_what_sentencepiece_says(
    tmp_path: Path, target: Path, options: dict
) -> None:
    source = write_tokenizer_model(tmp_path / "source", **options)
    copy_tokenizer(source, target)
    tokenizer = load(target)
    processor = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in TEXTS:
        want = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == want, text
        assert tokenizer.encode(text) == [processor.bos_id(), *want], text
        assert tokenizer.decode(want) == processor.decode(want), text
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert sorted(path.name for path in target.iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip


def test_no_tokenizer(tmp_path: Path, target: Path) -> None:
    assert copy_tokenizer(tmp_path, target) is False
    assert list(target.iterdir()) == []
    with refused("has no tokenizer", "<|a|>"):
        copy_tokenizer(tmp_path, target, ["<|a|>"])


def test_what_cannot_be_read_is_refused(tmp_path: Path, source: Path, target: Path) -> None:
    with refused("is not a BPE model", "model_type=bpe"):
        copy_tokenizer(write_tokenizer_model(tmp_path / "unigram", model_type="unigram"), target)
    (source / "tokenizer.model").write_bytes(b"not a model")
    with refused("tokenizer.model is not a sentencepiece model"):
        copy_tokenizer(source, target)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SomebodysOwnTokenizer"}))
    (source / "tokenizer.model").unlink()
    with refused(str(source), "transformers cannot read its tokenizer"):
        copy_tokenizer(source, target)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<pad>": None}),
        ("added_tokens.json", {"<pad>": "last"}),
        ("added_tokens.json", {"<pad>": 1 << 31}),
    ],
)
def test_added_tokens_of_another_shape(source: Path, name: str, content: dict) -> None:
    (source / name).write_text(json.dumps(content))
    with refused(str(source / name), "must be an object like"):
        check_tokenizer(source, 500)


def test_an_embedding_too_small_for_the_tokenizer(source: Path, target: Path) -> None:
    check_tokenizer(source, VOCAB_SIZE)
    with refused(f"has {VOCAB_SIZE} ids", f"{VOCAB_SIZE - 2} rows", f"id without a row is {VOCAB_SIZE - 2}"):
        check_tokenizer(source, VOCAB_SIZE - 2)
    copy_tokenizer(source, target, ["<|a|>"])
    with refused("'<|a|>'"):
        check_tokenizer(target, VOCAB_SIZE)


# What somebody may change in a copy, and how it is named.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "eos": ({"eos_token": "<unk>"}, "eos_token"),
    "mask": ({"mask_token": "<unk>"}, "mask_token"),
    "template": ({"chat_template": "{{ messages[1].content }}"}, "chat_template"),
    "inputs": ({"model_input_names": ["input_ids", "token_type_ids"]}, "model_input_names"),
    "side": ({"padding_side": "left"}, "padding_side"),
    "flag": (
        {"added_tokens_decoder": {"2": {"content": "</s>", "rstrip": True, "special": True}}},
        "added token </s>",
    ),
    "bos": ({"add_bos_token": False}, "ids"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_setting_is_named(source: Path, target: Path, case: str) -> None:
    changes, expected = CHANGES[case]
    copy_tokenizer(source, target)
    other = target.with_name("other")
    shutil.copytree(target, other)
    if case == "bos":  # 4.x goes by the post-processor, 5.x by the setting
        change_json(other / "tokenizer.json", post_processor=None)
    if case == "flag":
        content = json.loads((other / "tokenizer.json").read_text())
        content["added_tokens"][2]["rstrip"] = True
        change_json(other / "tokenizer.json", **content)
        settings = json.loads((other / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"]["2"]["rstrip"] = True
        changes = settings
    change_json(other / "tokenizer_config.json", **changes)
    assert expected in [what for what, _ in compare_tokenizers(source, other)]


def test_swapped_ids_and_merges_are_named(source: Path, target: Path) -> None:
    copy_tokenizer(source, target)
    content = json.loads((target / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    one, other = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    change_json(target / "tokenizer.json", **content)
    assert compare_tokenizers(source, target)[0] == (
        "vocabulary",
        f"2 tokens differ, first {one!r}: id 300 against 301",
    )
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    content["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
    change_json(target / "tokenizer.json", **content)
    assert ("merges", "they differ") in compare_tokenizers(source, target)


def test_a_side_without_a_tokenizer(source: Path, target: Path) -> None:
    assert compare_tokenizers(target, target) == []
    assert compare_tokenizers(source, target) == [("tokenizer", "missing in B")]
    assert compare_fingerprints(None, tokenizer_fingerprint(source)) == [("tokenizer", "missing in A")]


def test_where_the_versions_of_transformers_differ_it_is_said(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("meditron_train"), "propagate", True)
    source = tmp_path / "source"
    llama(source, legacy=False)
    with caplog.at_level("WARNING", logger="meditron_train"):
        copy_tokenizer(source, target)
    assert "4.x and 5.x make different ids from tokenizer.model without tokenizer.json" in caplog.text
