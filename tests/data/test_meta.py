from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meditron_train.data.meta import FORMAT, meta_path, read_meta
from meditron_train.errors import UserError

META: dict[str, Any] = {
    "format": FORMAT,
    "sha256": "0",
    "special_tokens": [],
    "tokenizer": {"directory": "tokenizer", "vocab_size": 400, "fingerprint": "1"},
    "sources": [{"path": "a.jsonl", "documents": 1, "tokens": 2}],
}


def test_whole(tmp_path: Path) -> None:
    assert read_meta(tmp_path / "a") is None
    meta_path(tmp_path / "a").write_text(json.dumps(META))
    assert read_meta(tmp_path / "a") == META


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "does not have the format"),
        (
            json.dumps({"format": FORMAT}),
            "lacks sha256, special_tokens, tokenizer, sources, tokenizer.directory",
        ),
        (json.dumps(META | {"tokenizer": "llama"}), "lacks tokenizer, tokenizer.directory"),
        (
            json.dumps(META | {"tokenizer": {"directory": "a"}}),
            "lacks tokenizer.vocab_size, tokenizer.fingerprint",
        ),
        (json.dumps(META | {"sources": 3}), "lacks sources,"),
        (json.dumps(META | {"sources": ["a", {}]}), "lacks sources.path, sources.documents, sources.tokens,"),
    ],
)
def test_damaged(tmp_path: Path, content: str, message: str) -> None:
    meta_path(tmp_path / "a").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_meta(tmp_path / "a")
    assert str(meta_path(tmp_path / "a")) in str(caught.value)
