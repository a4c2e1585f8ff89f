"""The tokenizer files of a Hugging Face directory, in the one form that transformers 4.x and 5.x read alike.

For a sentencepiece tokenizer that is: `tokenizer.model` unchanged, a `tokenizer.json` whose normalizer prepends and
replaces spaces (Metaspace, as 5.x writes it, gets leading spaces wrong), and a `tokenizer_config.json` and
`special_tokens_map.json` of our own (5.x writes lists where 4.x expects objects). `tokenizer.json` is checked against
sentencepiece on probe texts before it is trusted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.sentencepiece_json import convert_sentencepiece, surround
from meditron_train.errors import UserError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_COPIED_FILES = ("chat_template.jinja", "chat_template.json")
_KEPT_SETTINGS = ("chat_template", "model_max_length", "padding_side")
_ADDED_AROUND = {
    "bos_token": "add_bos_token",
    "eos_token": "add_eos_token",
}  # named token: whether encoding adds it
_NO_LIMIT = 10**30  # transformers' way to say that a tokenizer has no maximum length

PROBE_TEXTS = (
    "The dose is 5 mg/kg twice daily.", " leading space", "  two leading", "trailing  ", "a  b   c", "", " ", "   ",
    "line one\nline two\n\n\tindented", "\n", "naïve café – “quoted” … ½ µg α-blocker β₂ ≥ 40 °C", "漢字かな عربي",
    "emoji 🧬🩺 and \U0001f9ec", "x=1;y=[2,3]{z}", "CamelCase_snake-case/path\\back", "http://example.org/?q=a&b=c#d",
    "1234567890 3.14159 1,000,000", "\u00a0non-breaking\u200bzero width", "ﬁ ligature ① ⅷ Å", "▁ literal lower block",
)  # fmt: skip


def copy_tokenizer(source: str | Path, target: str | Path, special_tokens: Sequence[str] = ()) -> bool:
    """Write the tokenizer of directory `source` into the existing directory `target`; False if there is none.

    `special_tokens` are appended after the vocabulary in the order given; those it has already keep their id.
    Raises UserError when a file is damaged or the tokenizer cannot be written so that transformers agrees with it.
    """
    source, target = Path(source), Path(target)
    model_file, json_file = (source / name for name in TOKENIZER_FILES)
    if not model_file.is_file() and not json_file.is_file():
        if special_tokens:
            raise UserError(f"{source} has no tokenizer to which {', '.join(special_tokens)} could be added.")
        return False
    original = read_json_object(json_file) if json_file.is_file() else None
    tokenizer = original
    if model_file.is_file() and (original is None or not agrees_with_sentencepiece(original, model_file)):
        tokenizer = convert_sentencepiece(model_file)
        _carry_added_tokens(source, original, tokenizer)
        if not agrees_with_sentencepiece(tokenizer, model_file):
            raise UserError(
                f"{model_file}: no tokenizer.json gives the ids that sentencepiece gives. Train the model with "
                "normalization_rule_name=identity, remove_extra_whitespaces=false and byte_fallback=true."
            )
    assert tokenizer is not None  # one of the two files exists
    named = named_tokens(source)
    if model_file.is_file():
        tokenizer = _adding_as_stated(source, tokenizer, named)
    changed = _append_special_tokens(tokenizer, special_tokens) or tokenizer is not original
    if changed:
        _write_json(target / "tokenizer.json", tokenizer, indent=2)
    else:
        shutil.copyfile(json_file, target / "tokenizer.json")
    if model_file.is_file():
        shutil.copyfile(model_file, target / "tokenizer.model")
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    settings = _settings(source, tokenizer, named, from_sentencepiece=model_file.is_file())
    _write_json(target / "tokenizer_config.json", settings, indent=2)
    _write_json(target / "special_tokens_map.json", named, indent=2)
    return True


def has_tokenizer(directory: str | Path) -> bool:
    """Whether the directory holds a tokenizer."""
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def vocabularies(directory: str | Path) -> dict[str, dict[str, int]]:
    """File name -> (token -> id) for each tokenizer file of the directory; tokens added to either are in both."""
    directory = Path(directory)
    found: dict[str, dict[str, int]] = {}
    added = _added_ids(directory)
    if (directory / "tokenizer.model").is_file():
        found["tokenizer.model"] = {**_sentencepiece_vocabulary(directory / "tokenizer.model"), **added}
    if (directory / "tokenizer.json").is_file():
        tokenizer = read_json_object(directory / "tokenizer.json")
        found["tokenizer.json"] = {**_json_vocabulary(tokenizer, directory / "tokenizer.json"), **added}
    return found


def check_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Raise UserError when a token of the directory's tokenizer has no row in an embedding of `vocab_size` rows."""
    for file, vocabulary in vocabularies(directory).items():
        beyond = sorted((number, token) for token, number in vocabulary.items() if number >= vocab_size)
        if beyond:
            number, token = beyond[0]
            raise UserError(
                f"{Path(directory) / file}: the tokenizer has {max(vocabulary.values()) + 1} ids, but the embedding "
                f"has {vocab_size} rows (config.json: vocab_size). The first id without a row is {number} ({token!r}). "
                "Use the tokenizer that belongs to the model, or resize its embedding."
            )


def named_tokens(directory: str | Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, unk_token and pad_token, as far as the directory states them."""
    directory = Path(directory)
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            stated |= {
                key: value for key, value in read_json_object(directory / name).items() if key in NAMED_TOKENS
            }
    tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in stated.items()}
    if (directory / "tokenizer.model").is_file():
        tokens = {**_sentencepiece_named_tokens(directory / "tokenizer.model"), **tokens}
    return {key: tokens[key] for key in NAMED_TOKENS if isinstance(tokens.get(key), str)}


def special_settings(directory: str | Path) -> dict[str, Any]:
    """add_bos_token and add_eos_token: whether encoding adds it ("contradictory": the files disagree);
    additional_special_tokens: the texts, sorted, of those that have an id."""
    directory = Path(directory)
    given, named = _tokenizer_config(directory), named_tokens(directory)
    model_file, json_file = (directory / name for name in TOKENIZER_FILES)
    tokenizer = read_json_object(json_file) if json_file.is_file() else None
    if (
        model_file.is_file()
        and tokenizer is not None
        and not agrees_with_sentencepiece(tokenizer, model_file)
    ):
        tokenizer = None  # not the one that is converted
    is_llama = model_file.is_file() and "Llama" in str(given.get("tokenizer_class", "LlamaTokenizer"))
    settings: dict[str, Any] = {}
    for name, key in _ADDED_AROUND.items():
        stated = given.get(key)
        adds = name == "bos_token" if tokenizer is None else _adds(tokenizer, named.get(name))
        if isinstance(stated, bool) and (is_llama or tokenizer is None):
            adds = stated  # this class takes no notice of the post-processor
        contradicts = isinstance(stated, bool) and stated != adds
        settings[key] = "contradictory" if contradicts else adds and name in named
    return {**settings, "additional_special_tokens": _additional_special_tokens(directory)}


def effective_tokenizer(directory: Path) -> dict[str, Any]:
    """tokenizer.json as transformers takes it: LlamaTokenizer puts its own post-processor in place of the file's."""
    tokenizer = read_json_object(directory / "tokenizer.json")
    if not (directory / "tokenizer.model").is_file():
        return tokenizer
    return _adding_as_stated(directory, tokenizer, named_tokens(directory))


def agrees_with_sentencepiece(tokenizer: dict[str, Any], model_file: Path) -> bool:
    """Whether tokenizer.json gives the ids of sentencepiece on every probe text."""
    from tokenizers import Tokenizer

    processor = _load_sentencepiece(model_file)
    try:
        fast = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception:  # the library raises bare Exception for anything it cannot parse
        return False
    return all(
        fast.encode(text, add_special_tokens=False).ids == processor.encode(text) for text in PROBE_TEXTS
    )


def _adds(tokenizer: dict[str, Any], token: str | None) -> bool:
    """Whether tokenizer.json's post-processor adds the token."""
    text = json.dumps(tokenizer.get("post_processor"), ensure_ascii=False)
    return token is not None and json.dumps(token, ensure_ascii=False) in text


def _adding_as_stated(source: Path, tokenizer: dict[str, Any], named: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json that adds bos and eos as the source does: itself, or with another post-processor."""
    stated = special_settings(source)
    adds = {name: _adds(tokenizer, named.get(name)) for name in _ADDED_AROUND}
    wanted = {
        name: adds[name] if stated[key] == "contradictory" else stated[key]
        for name, key in _ADDED_AROUND.items()
    }
    if wanted == adds:
        return tokenizer
    vocabulary = _json_vocabulary(tokenizer, source / "tokenizer.json")
    before, after = (
        {named[name]: vocabulary[named[name]]} if wanted[name] and named[name] in vocabulary else {}
        for name in _ADDED_AROUND
    )
    return {**tokenizer, "post_processor": surround(before, after)}


def _additional_special_tokens(directory: Path) -> list[str]:
    """transformers 4.x has them under one name, 5.x under another."""
    path = directory / "special_tokens_map.json"
    found: set[str] = set()
    for stated in (_tokenizer_config(directory), read_json_object(path) if path.is_file() else {}):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = stated.get(key)
            for token in tokens if isinstance(tokens, list) else []:
                found.add(str(token.get("content") if isinstance(token, dict) else token))
    known = set().union(*vocabularies(directory).values()) if found else set()
    return sorted(found & known)


def _carry_added_tokens(source: Path, original: dict[str, Any] | None, tokenizer: dict[str, Any]) -> None:
    """Keep the tokens that were added to the vocabulary when tokenizer.json is made anew."""
    known = {token["content"] for token in tokenizer["added_tokens"]}
    added = {token["content"]: token for token in (original or {}).get("added_tokens", [])}
    for content, number in _added_ids(source).items():
        added.setdefault(content, _added_token(content, number))
    tokenizer["added_tokens"] += sorted(
        (token for content, token in added.items() if content not in known), key=lambda token: token["id"]
    )


def _append_special_tokens(tokenizer: dict[str, Any], special_tokens: Sequence[str]) -> bool:
    vocabulary = _json_vocabulary(tokenizer, Path("tokenizer.json"))
    registered = {token["content"] for token in tokenizer.get("added_tokens", [])}
    changed = False
    for content in special_tokens:
        if content not in registered:
            number = vocabulary.setdefault(content, max(vocabulary.values()) + 1)
            tokenizer.setdefault("added_tokens", []).append(_added_token(content, number))
            registered.add(content)
            changed = True
    tokenizer.get("added_tokens", []).sort(key=lambda token: token["id"])
    return changed


def _added_token(content: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def _settings(
    source: Path, tokenizer: dict[str, Any], named: dict[str, str], *, from_sentencepiece: bool
) -> dict[str, Any]:
    """Our tokenizer_config.json. The class LlamaTokenizer would make 5.x rebuild the normalizer; the plain one reads
    tokenizer.json as it stands, in 4.x too."""
    given = _tokenizer_config(source)
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer.get("added_tokens", [])
    }
    settings: dict[str, Any] = {
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        **{key: given[key] for key in _KEPT_SETTINGS if given.get(key) is not None},
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    # 5.x acts on these, 4.x on tokenizer.json's post-processor alone: say the same in both places.
    for name, key in _ADDED_AROUND.items():
        if from_sentencepiece:
            settings[key] = _adds(tokenizer, named.get(name))
        elif isinstance(given.get(key), bool):
            settings[key] = given[key]
    if additional := _additional_special_tokens(source):
        settings["additional_special_tokens"] = additional
    return settings


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _json_vocabulary(tokenizer: dict[str, Any], path: Path) -> dict[str, int]:
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        return {
            **vocabulary,
            **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer: {error!r}") from None


def _added_ids(directory: Path) -> dict[str, int]:
    """Tokens that added_tokens.json or tokenizer_config.json put beside the vocabulary."""
    added: dict[str, int] = {}
    if (directory / "tokenizer_config.json").is_file():
        path = directory / "tokenizer_config.json"
        decoder = read_json_object(path).get("added_tokens_decoder") or {}
        try:
            added |= {str(token["content"]): int(number) for number, token in decoder.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f'{path}: added_tokens_decoder must be an object like {{"32000": {{"content": "<pad>"}}}}.'
            ) from None
    if (directory / "added_tokens.json").is_file():
        path = directory / "added_tokens.json"
        try:
            added |= {content: int(number) for content, number in read_json_object(path).items()}
        except (TypeError, ValueError):
            raise UserError(f'{path} must be an object like {{"<pad>": 32000}}.') from None
    return added


def _load_sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from None


def sentencepiece_ids(model_file: Path) -> list[list[int]]:
    """The ids that sentencepiece gives for the probe texts."""
    processor = _load_sentencepiece(model_file)
    return [processor.encode(text) for text in PROBE_TEXTS]


def _sentencepiece_vocabulary(path: Path) -> dict[str, int]:
    processor = _load_sentencepiece(path)
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}


def _sentencepiece_named_tokens(path: Path) -> dict[str, str]:
    processor = _load_sentencepiece(path)
    numbers = {
        "bos_token": processor.bos_id(), "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(), "pad_token": processor.pad_id(),
    }  # fmt: skip
    return {key: processor.id_to_piece(number) for key, number in numbers.items() if number >= 0}


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return value


def _write_json(path: Path, value: dict[str, Any], indent: int) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
