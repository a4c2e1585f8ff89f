"""Whether what is about to be published is the model that was trained, by its bits and by its logits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.errors import MeditronError
from meditron_train.evaluate.language_model import load_language_model
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.verify.compare_logits import probe_ids, transformers_logits
from meditron_train.verify.side import open_full_side
from meditron_train.verify.verify import verify

_TOLERANCE = 1e-5  # relative to the largest logit, as in verify.compare_logits
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Check:
    """How the published model compares with its reference.

    Attributes:
        transformers: its version.
        max_difference: largest |Δ| of the published model's logits from the reference's, both by transformers.
        ours_max_difference: the same with the published model's logits by our own code.
        largest: |logit|.
        cast: dtype to which the reference was cast.
        is_loaded: whether transformers also loaded the directory as a user does (from_pretrained), which takes the
            memory of the whole model in float32.
    """

    transformers: str
    num_tensors: int
    max_difference: float
    ours_max_difference: float
    largest: float
    cast: str | None
    is_loaded: bool


def check_model(reference: Path, directory: Path, dtype: str | None) -> Check:
    """Compare a Hugging Face directory with the checkpoint that it is made from.

    Every tensor, the configuration, the tokenizer, and the logits of transformers and of our own code in float32.

    Args:
        dtype: the cast that was asked for.

    Raises:
        MeditronError: anything differs.
    """
    found = verify(reference, directory, dtype=dtype, logits=True)
    if found.differences or found.logits is None:
        lines = [str(difference) for difference in found.differences[:10]]
        raise MeditronError("\n  ".join([f"{directory} is not the model of {reference}:", *lines]))
    return Check(
        version("transformers"),
        found.num_tensors,
        found.logits.max_difference,
        found.logits.ours_max_difference,
        found.logits.largest,
        found.cast,
        _loads(directory),
    )


def _loads(directory: Path) -> bool:
    """Whether `from_pretrained` gives the logits of the tensors in the files.

    Returns:
        False where it was not tried, for want of memory or of a tokenizer.

    Raises:
        MeditronError: it gives others.
    """
    num_bytes = 4 * read_hf_config(directory).num_parameters
    if num_bytes > _SHARE_OF_MEMORY * psutil.virtual_memory().available or not has_tokenizer(directory):
        return False
    side = open_full_side(directory)
    ids = probe_ids(side)
    want, got = transformers_logits(side, ids), load_language_model(directory).logits(ids)
    difference = (want - got).abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, want.abs().max().item()):
        raise MeditronError(
            f"{directory}: from_pretrained of transformers gives logits that differ by {difference:.3e} from those of "
            "the tensors in the files"
        )
    return True
