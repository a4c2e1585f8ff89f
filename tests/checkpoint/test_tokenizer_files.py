"""The tokenizer directory: transformers gives sentencepiece's ids, whatever form the source came in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from meditron_train.checkpoint.tokenizer_compare import (
    compare_fingerprints,
    compare_tokenizers,
    tokenizer_fingerprint,
)
from meditron_train.checkpoint.tokenizer_files import (
    check_tokenizer,
    copy_tokenizer,
    named_tokens,
    special_settings,
    vocabularies,
)
from tests.checkpoint.tiny_llama import change_json
from tests.checkpoint.tiny_tokenizer import (
    VOCAB_SIZE,
    awkward_texts,
    generated_texts,
    write_tokenizer_model,
)
from tests.refusal import refused

TEXTS = [
    *generated_texts(100, seed=5),
    *awkward_texts(300),
    *(f"  {text}" for text in generated_texts(50, seed=6)),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer_model(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def assert_as_sentencepiece(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    for text in TEXTS:
        want = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == want, text
        assert tokenizer.encode(text) == [processor.bos_id(), *want], text
        assert tokenizer.decode(want) == processor.decode(want), text


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
def test_transformers_encodes_as_sentencepiece(tmp_path: Path, target: Path, options: dict) -> None:
    source = write_tokenizer_model(tmp_path / "source", **options)
    assert copy_tokenizer(source, target)
    assert_as_sentencepiece(target)
    assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert compare_tokenizers(source, target) == []


def test_a_right_tokenizer_json_is_kept_byte_for_byte(source: Path, target: Path, tmp_path: Path) -> None:
    copy_tokenizer(source, target)
    again = tmp_path / "again"
    again.mkdir()
    kept = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(kept))  # same content, other bytes than ours
    copy_tokenizer(target, again)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (again / name).read_bytes() == (target / name).read_bytes()


def test_a_metaspace_tokenizer_json_is_made_anew(source: Path, target: Path, tmp_path: Path) -> None:
    """The form transformers 5 saves is wrong on leading spaces; tokens that were added to it are kept."""
    copy_tokenizer(source, target, ["<|kept|>"])
    file = target / "tokenizer.json"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    change_json(file, normalizer=None, pre_tokenizer=metaspace)
    repaired = tmp_path / "repaired"
    repaired.mkdir()
    copy_tokenizer(target, repaired)
    assert_as_sentencepiece(repaired)
    assert vocabularies(repaired)["tokenizer.json"]["<|kept|>"] == VOCAB_SIZE
    assert compare_tokenizers(target, repaired) == []
    assert compare_tokenizers(repaired, target) == [
        ("tokenizer.json", "B's does not give the ids of its own tokenizer.model")
    ]


def test_special_tokens_follow_the_vocabulary(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    copy_tokenizer(source, target, ["<|im_start|>", "</s>", "<|im_end|>"])
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "</s>", "<|im_end|>"])
    assert ids == [VOCAB_SIZE, 2, VOCAB_SIZE + 1]
    assert len(tokenizer) == VOCAB_SIZE + 2
    processor = SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    got = tokenizer.encode("<|im_start|>kamo", add_special_tokens=False)
    assert got[0] == VOCAB_SIZE
    assert got[1:] in (processor.encode("kamo"), processor.encode("kamo")[1:])
    assert_as_sentencepiece(target)


def test_named_tokens_and_settings(source: Path, target: Path) -> None:
    as_5x_writes = {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "extra_special_tokens": ["a", "list", "which", "4.x", "cannot", "read"],
        "chat_template": "{{ messages }}",
        "model_max_length": 4096,
        "tokenizer_class": "TokenizersBackend",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(as_5x_writes))
    copy_tokenizer(source, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == "{{ messages }}"
    assert settings["model_max_length"] == 4096
    assert settings["add_bos_token"] is True
    assert settings["add_eos_token"] is False
    assert "extra_special_tokens" not in settings
    assert settings["added_tokens_decoder"]["1"]["content"] == "<s>"
    assert named_tokens(target) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_tokenizer_without_sentencepiece(tmp_path: Path, target: Path) -> None:
    """As of Llama 3: byte-level BPE in tokenizer.json alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(generated_texts(300), trainer)
    source = tmp_path / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    )
    copy_tokenizer(source, target, ["<|new|>"])
    loaded = AutoTokenizer.from_pretrained(target)
    assert all(loaded.encode(text) == tokenizer.encode(text).ids for text in TEXTS)
    assert loaded.convert_tokens_to_ids("<|new|>") == 350
    assert loaded.eos_token == "<|end|>"


def test_no_tokenizer(tmp_path: Path, target: Path) -> None:
    assert copy_tokenizer(tmp_path, target) is False
    assert list(target.iterdir()) == []
    assert vocabularies(tmp_path) == {}
    with refused("has no tokenizer", "<|a|>"):
        copy_tokenizer(tmp_path, target, ["<|a|>"])


def test_damaged_tokenizers(tmp_path: Path, source: Path, target: Path) -> None:
    (source / "tokenizer.json").write_text("{")
    with refused("tokenizer.json is not valid JSON"):
        copy_tokenizer(source, target)
    (source / "tokenizer.json").write_text("[]")
    with refused("must hold a JSON object"):
        copy_tokenizer(source, target)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"not a model")
    with refused("tokenizer.model is not a sentencepiece model"):
        copy_tokenizer(source, target)
    with refused("is not a BPE model", "model_type=bpe"):
        copy_tokenizer(write_tokenizer_model(tmp_path / "unigram", model_type="unigram"), target)
    only_json = tmp_path / "only_json"
    only_json.mkdir()
    (only_json / "tokenizer.json").write_text("{}")
    with refused("tokenizer.json is not a tokenizer"):
        vocabularies(only_json)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["<pad>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": "<pad>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"special": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"last": {"content": "<pad>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("added_tokens.json", {"<pad>": None}),
        ("added_tokens.json", {"<pad>": "last"}),
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


def test_comparison_names_what_differs(source: Path, target: Path, tmp_path: Path) -> None:
    copy_tokenizer(source, target)
    assert compare_tokenizers(tmp_path, tmp_path) == []
    assert compare_tokenizers(source, tmp_path) == [("tokenizer", "missing in B")]
    clean = json.loads((target / "tokenizer.json").read_text())

    def compare_with(**changes) -> list[tuple[str, str]]:
        change_json(target / "tokenizer.json", **{**clean, **changes})
        return compare_tokenizers(source, target)

    assert compare_with() == []
    vocabulary = clean["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[300:302]
    swapped = {**vocabulary, one: vocabulary[other], other: vocabulary[one]}
    assert compare_with(model={**clean["model"], "vocab": swapped})[0] == (
        "tokenizer.model against tokenizer.json",
        f"2 tokens differ, first {one!r}: id 300 against 301",
    )
    assert "own tokenizer.model" in compare_with(normalizer=None)[0][1]
    change_json(target / "tokenizer.json", **clean)
    change_json(target / "tokenizer_config.json", eos_token="<unk>")
    assert ("eos_token", "'</s>' against '<unk>'") in compare_tokenizers(source, target)
    copy_tokenizer(source, target)
    change_json(target / "tokenizer_config.json", chat_template="{{ x }}")
    assert compare_tokenizers(source, target) == [("chat_template", "None against '{{ x }}'")]


def test_comparison_of_merges_and_post_processing(tmp_path: Path, source: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for directory in (a, b):
        directory.mkdir()
        copy_tokenizer(source, directory)
        (directory / "tokenizer.model").unlink()
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    change_json(b / "tokenizer.json", post_processor=None)
    assert [what for what, _ in compare_tokenizers(a, b)] == ["add_bos_token", "tokenizer.json"]
    assert "becomes" in compare_tokenizers(a, b)[1][1]
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
    change_json(b / "tokenizer.json", **tokenizer)
    assert compare_tokenizers(a, b) == [("tokenizer.json", "the merges differ")]


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False), (True, False)])
def test_what_encoding_adds_is_what_the_source_says(
    source: Path, target: Path, tmp_path: Path, with_json: bool, bos: bool, eos: bool
) -> None:
    from transformers import AutoTokenizer

    if with_json:  # whose post-processor adds bos, which LlamaTokenizer overrides
        copy_tokenizer(source, target)
        (target / "tokenizer.json").rename(source / "tokenizer.json")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    copy_tokenizer(source, target)
    assert compare_tokenizers(source, target) == []
    assert compare_fingerprints(tokenizer_fingerprint(source), tokenizer_fingerprint(target)) == []
    ids = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode("ka mo")
    assert AutoTokenizer.from_pretrained(target).encode("ka mo") == [*[1] * bos, *ids, *[2] * eos]


def test_a_tokenizer_json_against_its_own_settings_is_left_as_it_is(source: Path, target: Path) -> None:
    """4.x goes by the one, 5.x by the other: there is nothing to be right."""
    copy_tokenizer(source, target)
    change_json(target / "tokenizer_config.json", add_bos_token=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).rename(source / name)
    kept = (source / "tokenizer.json").read_bytes()
    copy_tokenizer(source, target)
    assert (target / "tokenizer.json").read_bytes() == kept
    assert special_settings(source)["add_bos_token"] == "contradictory"
    assert special_settings(target)["add_bos_token"] is True
    assert compare_tokenizers(source, target) == [("add_bos_token", "'contradictory' against True")]
