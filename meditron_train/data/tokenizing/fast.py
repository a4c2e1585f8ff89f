"""A faster encoder for sentencepiece models (gigatoken), checked to give exactly what sentencepiece gives.

It is used only after it has encoded a sample of these very texts identically, and every Nth document after
that is encoded by both. Where they differ, `FastEncoderDiffersError` says so, and the work starts again with
sentencepiece.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable

from meditron_train.data.tokenizing.tokenizer import Definition, SentencePieceTokenizer, Tokenizer
from meditron_train.log import get_logger
from meditron_train.tokenizer.files import MODEL

_log = get_logger(__name__)


class FastEncoderDiffersError(Exception):
    """The fast encoder gave other ids than sentencepiece."""


class FastTokenizer(SentencePieceTokenizer):
    """The same ids as SentencePieceTokenizer, several times as fast."""

    def __init__(self, definition: Definition) -> None:
        import gigatoken

        super().__init__(definition)
        self._fast = gigatoken.Tokenizer.from_sentencepiece(self.directory / MODEL)
        # gigatoken takes "<s>" and the like in a text for the token; sentencepiece, for text.
        literals = [re.escape(piece) for piece in self.control_pieces()]
        self._slow_texts = re.compile("|".join(literals)) if literals else None

    def _encode_part(self, text: str) -> list[int]:
        if self._slow_texts is not None and self._slow_texts.search(text):
            return super()._encode_part(text)
        return list(self._fast.encode(text).tolist())

    def check(self, text: str) -> None:
        """Check that both encode the text identically, as a whole and with special tokens.

        Raises:
            FastEncoderDiffersError: they do not.
        """
        for part in self.split(text):
            if FastTokenizer._encode_part(self, part) != super()._encode_part(part):
                raise FastEncoderDiffersError(f"a text of {len(part)} characters that begins {part[:40]!r}")


def prove_fast(tokenizer: Tokenizer, sample: Iterable[str]) -> bool:
    """Whether the fast encoder may be used for texts such as these; the log says why not."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        _log.info(
            "tokenizing with %s: there is a faster encoder for sentencepiece models only", tokenizer.directory
        )
        return False
    if importlib.util.find_spec("gigatoken") is None:
        _log.info(
            "tokenizing with sentencepiece; pip install 'meditron-train[corpus]' brings a faster encoder"
        )
        return False
    try:
        fast = FastTokenizer(tokenizer.definition)
    except Exception as error:  # whatever the library makes of a model it does not support
        _log.info("tokenizing with sentencepiece: gigatoken cannot load this model (%s)", error)
        return False
    count = 0
    try:
        for text in sample:
            fast.check(text)
            count += 1
    except FastEncoderDiffersError as error:
        _log.warning("tokenizing with sentencepiece: gigatoken differs from it on %s", error)
        return False
    _log.info("tokenizing with gigatoken: identical to sentencepiece on a sample of %d documents", count)
    return count > 0
