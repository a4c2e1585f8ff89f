"""What differs between two readings of a tokenizer, and what identifies one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from meditron_train.tokenizer.reading import Reading

_ENCODING = ("normalizer", "pre_tokenizer", "added_tokens", "model")  # of tokenizer.json: what decides ids


def compare_readings(a: Reading, b: Reading, new_tokens: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Every difference between two tokenizers; empty when A and B mean the same.

    Compared: every token's id and the added tokens' flags, all named tokens, the merges, the ids and the
    decoded text of probe texts (also with special and added tokens inside), chat templates with what they
    render, model_input_names, padding side and maximum length.

    Args:
        a, b: the readings of the two tokenizers.
        new_tokens: tokens that B has and A need not have.

    Returns:
        (what, description) of each difference.
    """
    new = set(new_tokens)
    vocabulary_b = {
        token: n for token, n in b.vocabulary.items() if token not in new or token in a.vocabulary
    }
    found = []
    if different := different_ids(a.vocabulary, vocabulary_b):
        found.append(("vocabulary", different))
    added_b = {
        token: flags for token, flags in b.added_tokens.items() if token not in new or token in a.added_tokens
    }
    for what, one, other in (
        ("added token", a.added_tokens, added_b),
        ("", a.named_tokens, b.named_tokens),
        ("", a.settings, b.settings),
    ):
        found += [(f"{what} {key}".strip(), text) for key, text in _different_values(one, other)]
    if _merges(a) != _merges(b):
        found.append(("merges", "they differ"))
    for what, texts_a, texts_b in (("ids", a.ids, b.ids), ("decoded text", a.decoded, b.decoded)):
        same = [text for text in texts_a if text in texts_b and not any(token in text for token in new)]
        others = [text for text in same if texts_a[text] != texts_b[text]]
        if others:
            pair = f"{texts_a[others[0]]} against {texts_b[others[0]]}"
            found.append(
                (what, f"{len(others)} of {len(same)} probe texts differ, first {others[0]!r}: {pair}")
            )
    found += [
        (f"chat_template {name}".removesuffix(" default"), text)
        for name, text in _different_values(a.templates, b.templates)
    ]
    return found


def different_ids(tokens_a: Mapping[str, int], tokens_b: Mapping[str, int]) -> str:
    """How many tokens have another id, and the first of them; empty when none has."""
    different = [t for t in tokens_a.keys() | tokens_b.keys() if tokens_a.get(t) != tokens_b.get(t)]
    if not different:
        return ""
    none = 1 << 60
    first = min(different, key=lambda t: (min(tokens_a.get(t, none), tokens_b.get(t, none)), t))
    return f"{len(different)} tokens differ, first {first!r}: id {tokens_a.get(first)} against {tokens_b.get(first)}"


def reading_fingerprint(reading: Reading) -> dict[str, Any]:
    """What identifies a tokenizer in a manifest: JSON-ready."""
    return {
        "transformers": reading.transformers,
        "num_tokens": len(reading.vocabulary),
        "vocabulary_sha256": _digest(sorted(reading.vocabulary.items())),
        "named_tokens": dict(reading.named_tokens),
        "settings": {"model_input_names": reading.settings.get("model_input_names")},
        "added_tokens_sha256": _digest(sorted(reading.added_tokens.items())),
        "merges_sha256": _digest(_merges(reading)),
        "ids_sha256": _digest(sorted(reading.ids.items())),
        "decoded_sha256": _digest(sorted(reading.decoded.items())),
        "chat_templates_sha256": _digest(sorted(reading.templates.items())),
    }


# What a fingerprint says that depends on the major version of transformers that read the files.
_OF_THE_VERSION = (
    "ids_sha256",
    "decoded_sha256",
    "chat_templates_sha256",
    "added_tokens_sha256",
    "merges_sha256",
)


def compare_fingerprints(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, description) of each difference between two fingerprints, in what both have.

    A manifest of an earlier version says less, and one that another major version of transformers made is not
    compared in what that version decides.
    """
    same_version = _major(a) == _major(b)
    keys = ["num_tokens", "vocabulary_sha256", *(_OF_THE_VERSION if same_version else ())]
    found = [
        (key.removesuffix("_sha256"), f"{_short(a[key])} against {_short(b[key])}")
        for key in keys
        if key in a and key in b and a[key] != b[key]
    ]
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    for section, only in (("named_tokens", None if same_version else named), ("settings", None)):
        one, other = (side.get(section) if isinstance(side.get(section), dict) else None for side in (a, b))
        if one is not None and other is not None:
            found += [pair for pair in _different_values(one, other) if only is None or pair[0] in only]
    return found


def encoding_digest(backend: str, *more: Any) -> str:
    """Hexadecimal SHA-256 of everything in a tokenizer.json that decides ids, and of `more`.

    The order of its keys and the way it spells its defaults do not matter.
    """
    content = json.loads(backend)
    model = content.get("model") or {}
    parts = {key: _without_defaults(content.get(key)) for key in _ENCODING}
    parts["model"] = {**parts["model"], "vocab": sorted(map(list, _pairs(model))), "merges": _pieces(model)}
    parts["added_tokens"] = sorted(
        ([t["id"], t["content"], _without_defaults(t)] for t in content.get("added_tokens") or []),
        key=lambda t: t[:2],
    )
    return _digest([parts, *more])


def _pairs(model: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    vocabulary = model.get("vocab") or {}
    return list(vocabulary.items()) if isinstance(vocabulary, dict) else [tuple(pair) for pair in vocabulary]


def _without_defaults(value: Any) -> Any:
    """Without null and false, which another version of the library writes or leaves out."""
    if isinstance(value, dict):
        cleaned = {k: _without_defaults(v) for k, v in value.items() if k not in ("vocab", "merges")}
        return {k: v for k, v in cleaned.items() if v is not None and v is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _pieces(model: Mapping[str, Any]) -> list[list[str]]:
    """Pairs, whichever of the library's two spellings the file uses ("a b" or ["a", "b"])."""
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]


def _merges(reading: Reading) -> list[list[str]]:
    return _pieces(json.loads(reading.backend).get("model") or {}) if reading.backend else []


def _different_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, f"{_short(a.get(key))} against {_short(b.get(key))}")
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _major(fingerprint: Mapping[str, Any]) -> str:
    return str(fingerprint.get("transformers")).split(".")[0]


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
