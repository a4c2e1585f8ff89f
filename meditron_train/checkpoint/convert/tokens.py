"""A Hugging Face model with more tokens: its tokenizer, embedding and output layer grow together."""

from __future__ import annotations

from pathlib import Path

from meditron_train.checkpoint.convert.engine import NO_LIMITS, Limits, Progress, describe_conversion
from meditron_train.checkpoint.convert.source_files import SourceFiles, files_identity
from meditron_train.checkpoint.convert.to_hf import write_hf_tensors
from meditron_train.checkpoint.convert.workspace import require_absent
from meditron_train.checkpoint.dtypes import require_convertible
from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.checkpoint.planned import PlannedTensor
from meditron_train.checkpoint.tensor_map import Piece, hf_shapes
from meditron_train.checkpoint.weight_sources import GrownVocabulary
from meditron_train.errors import UserError
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.tokenizer.reading import read_tokenizer
from meditron_train.units import parse_num_bytes


def add_tokens(
    base: Path,
    hf_directory: Path,
    tokens: tuple[str, ...],
    *,
    max_shard_size: str | int = "5GB",
    limits: Limits = NO_LIMITS,
    progress: Progress | None = None,
) -> int:
    """Write `base` with `tokens` as special tokens at the end of its vocabulary; returns the number of new rows.

    Those that the tokenizer has already stay as they are; rows that the embedding has to spare are used first. A new
    row is the mean of the old ones, as at the start of a run with data.special_tokens.

    Raises:
        UserError: `base` is not a Hugging Face model with a tokenizer, or the output exists and is not empty.
    """
    inputs = SourceFiles(base)
    stored, source = open_hf_model(base, read_once=True)
    if not has_tokenizer(base):
        raise UserError(
            f"{base} has no tokenizer (tokenizer.model or tokenizer.json) to which tokens could be added"
        )
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise UserError("tokens to add must be different and not empty")
    reading = read_tokenizer(base)
    num_new = sum(token not in reading.added_tokens for token in tokens)
    vocab_size = max(stored.vocab_size, reading.vocab_size + num_new)
    require_absent(hf_directory, base)
    grown = GrownVocabulary(source, vocab_size)
    model = stored.model_copy(update={"vocab_size": vocab_size})
    shapes = hf_shapes(model)
    for name in shapes:
        require_convertible(name, source.dtype(name), None)
    tensors = [
        PlannedTensor(name, source.dtype(name), shape, (Piece(name, 0, shape[0], name),))
        for name, shape in shapes.items()
    ]
    write_hf_tensors(
        grown,
        tensors,
        model,
        inputs,
        hf_directory,
        base,
        max_num_bytes=parse_num_bytes(max_shard_size),
        identity={"to": "more tokens", "tokens": list(tokens), "source": files_identity(base)},
        manifest=describe_conversion(base, model, None, format="hugging-face", added_tokens=list(tokens)),
        limits=limits,
        ranks=None,
        progress=progress,
        special_tokens=tokens,
    )
    return vocab_size - stored.vocab_size
