"""A tokenizer's files are read within bounds, whatever they say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meditron_train.tokenizer.files import content_digest
from meditron_train.tokenizer.reading import read_tokenizer
from tests.checkpoint.tokenizer.shapes import byte_level
from tests.refusal import refused


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_level(tmp_path)
    return tmp_path


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _expand(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return {"type": "Sequence", "normalizers": [step] * times}


def _template(token: str) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [special], "pair": [], "special_tokens": {}}


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "empty vocabulary": lambda c: (c.update(added_tokens=[]), c["model"].update(vocab={}, merges=[])),
    "id 2^31": lambda c: c["model"]["vocab"].update(zzz=1 << 31),
    "id 2^63": lambda c: c["model"]["vocab"].update(zzz=1 << 63),
    "negative id": lambda c: c["model"]["vocab"].update(zzz=-1),
    "a regex that backtracks": changed(pre_tokenizer=_split("(a+)+$")),
    "a normalizer that expands": changed(normalizer=_expand(1)),
    "a normalizer that takes all memory": changed(normalizer=_expand(4)),
    "added tokens are no list": changed(added_tokens={"a": 1}),
    "added token with the id '7'": lambda c: c["added_tokens"][0].update(id="7"),
    "post-processor with an unknown token": changed(post_processor=_template("nope")),
    "no model": changed(model=None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizers_are_refused(directory: Path, case: str) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    HOSTILE[case](content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with refused(str(directory)):
        read_tokenizer(directory)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a": ' + "9" * 5000 + "}", "[]", "\udcff"], ids=str.__len__
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_refused(directory: Path, name: str, text: str) -> None:
    (directory / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused(str(directory)):
        read_tokenizer(directory)


def test_what_is_no_file_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    os.mkfifo(directory / "tokenizer.json")
    with refused("tokenizer.json is not a regular file"):
        read_tokenizer(directory)


def test_no_code_of_a_directory_is_run(directory: Path) -> None:
    (directory / "tokenization_own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with refused(str(directory)):
        read_tokenizer(directory)
    assert not (directory / "ran").exists()


def test_a_template_that_never_ends_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meditron_train.tokenizer.bounded._BASE_CPU_S", 1.0)
    loop = ""  # no text: time ends it, not memory
    for variable in "ijk":
        loop = "{% for " + variable + " in range(99999) %}" + loop + "{% endfor %}"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": loop}))
    with refused(str(directory), "takes more than", "s of processor time"):
        read_tokenizer(directory)


@pytest.mark.parametrize(
    ("key", "values", "model_type"),
    [
        ("model_type", ("llama", "qwen2"), None),
        ("model_name", ("a", "b"), "llama"),
        ("tokenizer_class", ("A", "B"), "llama"),
        ("transformers_version", ("4.57.0", "5.1.0"), "pixtral"),
        ("transformers_version", ("4.57.0", "5.1.0"), "mistral"),
    ],
)
def test_what_config_json_decides_is_part_of_the_content(
    directory: Path, key: str, values: tuple[str, str], model_type: str | None
) -> None:
    digests = set()
    for value in values:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type, key: value}))
        digests.add(content_digest(directory))
    assert len(digests) == 2
