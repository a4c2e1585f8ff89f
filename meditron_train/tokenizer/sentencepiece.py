"""A `tokenizer.json` (tokenizers library) that encodes as a sentencepiece BPE model does.

sentencepiece merges the pair whose joined piece has the highest score; tokenizers merges the pair that stands first
in a list. So the list is every way to split a piece in two, in the order of the pieces' scores.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError

SPACE = "▁"  # what sentencepiece writes for a space

# sentencepiece's ModelProto.SentencePiece.Type and TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_BPE = 2
_MAX_PIECE_CHARACTERS = (
    1000  # every way to split one in two is tried; sentencepiece itself makes none beyond 512
)


def convert_sentencepiece(path: Path) -> dict[str, Any]:
    """The content of tokenizer.json for a sentencepiece BPE model.

    Raises:
        UserError: the model is of another kind.
    """
    proto = _parse(path)
    if proto is None:
        raise UserError(f"{path} is not a sentencepiece model")
    if proto.trainer_spec.model_type != _BPE:
        raise UserError(f"{path} is not a BPE model, as a Llama's is. Train it with model_type=bpe")
    pieces = list(proto.pieces)
    if not pieces or proto.trainer_spec.bos_id >= len(pieces):
        raise UserError(f"{path} is not a sentencepiece model: its vocabulary is empty, or lacks its own BOS")
    longest = max(len(piece.piece) for piece in pieces)
    if longest > _MAX_PIECE_CHARACTERS:
        raise UserError(
            f"{path} has a piece of {longest} characters: at most {_MAX_PIECE_CHARACTERS} are read"
        )
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    added = [
        {
            "id": number, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": piece.type != _USER_DEFINED,
        }
        for number, piece in enumerate(pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    bos = proto.trainer_spec.bos_id
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": surround({pieces[bos].piece: bos} if bos >= 0 else {}, {}),
        "decoder": _decoder(proto.normalizer_spec.add_dummy_prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges({piece.piece: piece.score for piece in pieces}, vocabulary),
        },
    }


def is_sentencepiece_bpe(path: Path) -> bool:
    """Whether a tokenizer.model is a BPE model of sentencepiece: Llama 3's, for one, is a list of tiktoken's."""
    proto = _parse(path)
    return proto is not None and len(proto.pieces) > 0 and proto.trainer_spec.model_type == _BPE


def _parse(path: Path) -> Any:
    """The ModelProto in a file; None when it holds none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return proto


def load_sentencepiece(path: Path) -> Any:
    """The SentencePieceProcessor of a tokenizer.model.

    Raises:
        UserError: the file is not a sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a sentencepiece model ({error}): copy it again") from None


def sentencepiece_named_tokens(path: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, unk_token and pad_token, as far as a tokenizer.model has them."""
    processor = load_sentencepiece(path)
    numbers = {
        "bos_token": processor.bos_id(), "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(), "pad_token": processor.pad_id(),
    }  # fmt: skip
    return {key: processor.id_to_piece(number) for key, number in numbers.items() if number >= 0}


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[list[str]]:
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [[left, right] for _, _, _, left, right in sorted(found)]


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(add_dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def surround(before: dict[str, int], after: dict[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts tokens (text -> id) around every sequence; None without any."""
    if not before and not after:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        first, last = (
            [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens]
            for tokens in (before, after)
        )
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in {**before, **after}.items()
        },
    }
