"""Train a sentencepiece tokenizer like Llama's on your own text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from meditron_train.data.tokenizing.readers import BadLineError, check_source, parse, read_chunks
from meditron_train.errors import UserError
from meditron_train.files import replacing

_CHUNK_BYTES = 4 << 20


def train_tokenizer(
    files: Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    text_key: str = "text",
    max_sentences: int = 10_000_000,
) -> None:
    """Train a BPE model like Llama's: digits apart, bytes for the unknown, text unchanged; write
    OUTPUT/tokenizer.model.

    The result is deterministic.

    Args:
        files: .jsonl or .txt, also .gz and .zst, or .parquet, read line by line.
        output: directory.
        vocab_size: tokens to learn, special ones included.
        text_key: key of the text.
        max_sentences: of more lines than this, a random sample is taken.

    Raises:
        UserError: the text cannot fill the vocabulary, or the vocabulary cannot hold the bytes.
    """
    import sentencepiece

    if not files:
        raise UserError("no files to train a tokenizer on")
    for path in files:
        check_source(path)
    target = output / "tokenizer.model"
    if target.exists():
        raise UserError(f"{target} is there already: give another --output")
    if vocab_size < 300:
        raise UserError(f"--vocab-size is {vocab_size}: 256 bytes and the special tokens alone need 300")
    output.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(files, text_key),
            model_writer=model,  # not a path, which would be written into the model
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"sentencepiece could not train {vocab_size} pieces on this text ({str(error).splitlines()[0]}): give more "
            "text or a smaller --vocab-size"
        ) from error
    with replacing(target) as file:
        file.write(model.getvalue())


def _lines(files: Sequence[Path], text_key: str) -> Iterator[str]:
    for path in files:
        for chunk in read_chunks(path, 0, (text_key, "id"), _CHUNK_BYTES):
            for line, record in enumerate(chunk.records, chunk.first_line):
                try:
                    document = parse(record, text_key, "id")
                except BadLineError as error:
                    raise UserError(f"{path}, line {line}: {error}") from error
                if document is not None:
                    yield from (part for part in document.text.splitlines() if part)
