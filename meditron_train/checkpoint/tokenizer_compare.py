"""What differs between the tokenizers of two directories."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.tokenizer_files import (
    NAMED_TOKENS,
    PROBE_TEXTS,
    TOKENIZER_FILES,
    agrees_with_sentencepiece,
    effective_tokenizer,
    has_tokenizer,
    named_tokens,
    read_json_object,
    sentencepiece_ids,
    special_settings,
    vocabularies,
)
from meditron_train.errors import UserError


def compare_tokenizers(a: str | Path, b: str | Path) -> list[tuple[str, str]]:
    """What differs between the tokenizers of two directories: (file, description) pairs, none when they are equal.

    Compared: every token's id, the named and special tokens, which of them encoding adds, tokenizer.model's bytes, the
    merges, the ids of probe texts and the chat template. A `tokenizer.json` of A that disagrees with its own
    `tokenizer.model` need not be repeated in B.
    """
    a, b = Path(a), Path(b)
    if has_tokenizer(a) != has_tokenizer(b):
        return [("tokenizer", f"missing in {'A' if has_tokenizer(b) else 'B'}")]
    if not has_tokenizer(a):
        return []
    try:
        return [*_compare_vocabularies(a, b), *_compare_encoding(a, b)]
    except UserError as error:
        return [("tokenizer", str(error))]


def tokenizer_fingerprint(directory: str | Path) -> dict[str, Any] | None:
    """What identifies a directory's tokenizer in a manifest: JSON-ready, None without a tokenizer.

    num_tokens, named_tokens, special_settings, SHA-256 of the vocabulary (token -> id) and of the chat template; and
    for each file that is there, SHA-256 of its vocabulary, of the ids of probe texts, and of the merges. A
    tokenizer.json that does not give the ids of its own tokenizer.model is "contradictory" instead of having those.
    Raises UserError when a file is damaged.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        return None
    found = vocabularies(directory)
    model, tokenizer = (directory / name for name in TOKENIZER_FILES)
    files: dict[str, dict[str, Any]] = {
        name: {"vocabulary_sha256": _digest(sorted(vocabulary.items()))} for name, vocabulary in found.items()
    }
    if model.is_file():
        files[model.name]["probe_ids_sha256"] = _digest(sentencepiece_ids(model))
    if tokenizer.is_file():
        if model.is_file() and not agrees_with_sentencepiece(read_json_object(tokenizer), model):
            files[tokenizer.name]["contradictory"] = True
        else:
            files[tokenizer.name]["probe_ids_sha256"] = _digest(_probe_ids(directory))
            files[tokenizer.name]["merges_sha256"] = _digest(_merges(tokenizer))
    first = next(iter(found))
    return {
        "num_tokens": len(found[first]),
        "named_tokens": named_tokens(directory),
        "special_settings": special_settings(directory),
        "vocabulary_sha256": files[first]["vocabulary_sha256"],
        "chat_template_sha256": _digest(_chat_template(directory)),
        "files": files,
    }


def compare_fingerprints(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[tuple[str, str]]:
    """(what, description) of each difference between two fingerprints, in what both have: a manifest of an earlier
    version says less, and a directory need not have every file. A contradictory tokenizer.json of A need not be
    repeated in B, as in `compare_tokenizers`."""
    if a is None or b is None:
        return [] if a is b else [("tokenizer", f"missing in {'A' if a is None else 'B'}")]
    found: list[tuple[str, str]] = [
        (key, f"{_short(a[key])} against {_short(b[key])}")
        for key in ("num_tokens", "vocabulary_sha256", "chat_template_sha256")
        if key in a and key in b and a[key] != b[key]
    ]
    names_a, names_b = (value.get("named_tokens") or {} for value in (a, b))
    special_a, special_b = (value.get("special_settings") or {} for value in (a, b))
    pairs = [(key, names_a.get(key), names_b.get(key)) for key in NAMED_TOKENS]
    pairs += [(key, special_a[key], special_b[key]) for key in special_a if key in special_b]
    found += [(key, f"{one!r} against {other!r}") for key, one, other in pairs if one != other]
    return found + _compare_files(a, b)


def _compare_files(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    files_a, files_b = a.get("files") or {}, b.get("files") or {}
    found = []
    for name in TOKENIZER_FILES:
        one, other = files_a.get(name), files_b.get(name)
        if other and other.get("contradictory") and not (one and one.get("contradictory")):
            found.append((name, "B's does not give the ids of its own tokenizer.model"))
        # A file that one side alone has holds the vocabulary of the other's files all the same.
        for label, file, whole in (("A", one, b), ("B", other, a)):
            if (
                file
                and not (one and other)
                and file.get("vocabulary_sha256") != whole.get("vocabulary_sha256")
            ):
                found.append((name, f"{label}'s vocabulary is not that of the other side"))
        if one and other:
            found += [
                (name, f"{key}: {_short(one[key])} against {_short(other[key])}")
                for key in ("vocabulary_sha256", "probe_ids_sha256", "merges_sha256")
                if key in one and key in other and one[key] != other[key]
            ]
    return found


def contradictory_ids(directory: str | Path) -> str:
    """What a directory's tokenizer.json says otherwise than its tokenizer.model, of the tokens that both have."""
    found = vocabularies(directory)
    if len(found) < 2:
        return ""
    model, tokenizer = (found[name] for name in TOKENIZER_FILES)
    both = model.keys() & tokenizer.keys()
    different = _different_ids({t: model[t] for t in both}, {t: tokenizer[t] for t in both})
    return f"tokenizer.model against tokenizer.json: {different}" if different else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _compare_vocabularies(a: Path, b: Path) -> list[tuple[str, str]]:
    found = []
    vocabularies_a, vocabularies_b = vocabularies(a), vocabularies(b)
    for file_a, tokens_a in vocabularies_a.items():
        for file_b, tokens_b in vocabularies_b.items():
            if file_a != file_b and file_a in vocabularies_b and file_b in vocabularies_a:
                continue  # each is compared with its namesake
            different = _different_ids(tokens_a, tokens_b)
            if different:
                found.append((file_a if file_a == file_b else f"{file_a} against {file_b}", different))
    named_a, named_b = named_tokens(a), named_tokens(b)
    for key in NAMED_TOKENS:
        if named_a.get(key) != named_b.get(key):
            found.append((key, f"{named_a.get(key)!r} against {named_b.get(key)!r}"))
    special_a, special_b = special_settings(a), special_settings(b)
    found += [
        (key, f"{special_a[key]!r} against {special_b[key]!r}")
        for key in special_a
        if special_a[key] != special_b[key]
    ]
    if (template_a := _chat_template(a)) != (template_b := _chat_template(b)):
        found.append(("chat_template", f"{_short(template_a)} against {_short(template_b)}"))
    return found


def _different_ids(tokens_a: dict[str, int], tokens_b: dict[str, int]) -> str:
    """How many tokens have another id, and the first of them; empty when none has."""
    none = 1 << 60
    ids = {
        token: (tokens_a.get(token, none), tokens_b.get(token, none))
        for token in tokens_a.keys() | tokens_b.keys()
    }
    different = sorted((min(pair), *pair, token) for token, pair in ids.items() if pair[0] != pair[1])
    if not different:
        return ""
    first = different[0][-1]
    return f"{len(different)} tokens differ, first {first!r}: id {tokens_a.get(first)} against {tokens_b.get(first)}"


def _compare_encoding(a: Path, b: Path) -> list[tuple[str, str]]:
    models, jsons = ([directory / name for directory in (a, b)] for name in TOKENIZER_FILES)
    both_models, both_jsons = (all(path.is_file() for path in paths) for paths in (models, jsons))
    if both_models and models[0].read_bytes() != models[1].read_bytes():
        return [("tokenizer.model", "the bytes differ")]
    right = [
        not (m.is_file() and j.is_file()) or agrees_with_sentencepiece(read_json_object(j), m)
        for m, j in zip(models, jsons, strict=True)
    ]
    if right[0] and not right[1]:
        return [("tokenizer.json", "B's does not give the ids of its own tokenizer.model")]
    if not both_jsons or not all(right):
        return []
    if _merges(jsons[0]) != _merges(jsons[1]):
        return [("tokenizer.json", "the merges differ")]
    ids_a, ids_b = _probe_ids(a), _probe_ids(b)
    for text, one, other in zip(PROBE_TEXTS, ids_a, ids_b, strict=True):
        if one != other:
            return [("tokenizer.json", f"{text!r} becomes {one} against {other}")]
    return []


def _merges(path: Path) -> list[list[str]]:
    """Pairs, whichever of the library's two spellings the file uses ("a b" or ["a", "b"])."""
    merges = read_json_object(path).get("model", {}).get("merges") or []
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]


def _probe_ids(directory: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    content = json.dumps(effective_tokenizer(directory))
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{directory / 'tokenizer.json'} is not a tokenizer: {error}") from None
    return [tokenizer.encode(text).ids for text in PROBE_TEXTS]


def _chat_template(directory: Path) -> Any:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    file = directory / "tokenizer_config.json"
    return read_json_object(file).get("chat_template") if file.is_file() else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
