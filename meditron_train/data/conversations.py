"""Conversations among the data: do they belong to the configuration, do they fit into a sample, what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meditron_train.config.chat import ChatSection
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import loss_mask_path, meta_path
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class Conversations:
    """How the conversations of a source are learned.

    Attributes:
        max_length: tokens of a conversation that are used at most.
        prompt_weight: weight of labels that are not the assistant's.
        num_too_long: conversations with more tokens than a sample, among those chosen.
        num_dropped: those of them that are left out.
    """

    max_length: int
    prompt_weight: float
    num_too_long: int = 0
    num_dropped: int = 0


def check_conversations(
    name: str,
    dataset: IndexedDataset,
    meta: dict[str, Any] | None,
    chat: ChatSection | None,
    template_sha256: str | None,
) -> bool:
    """Whether a source holds conversations.

    Args:
        name: of the source.
        dataset: its files.
        meta: content of its .meta.json, where it has one.
        chat: what the configuration says of conversations.
        template_sha256: of the template that `chat` names; None: any will do.

    Raises:
        UserError: its files do not belong together, or it was rendered by another template.
    """
    prefix, mask_path = dataset.prefix, loss_mask_path(dataset.prefix)
    stated = (meta or {}).get("chat")
    if stated is None:
        if dataset.loss_mask is None:
            return False
        raise UserError(
            f"data source {name!r}: {mask_path} marks the answers of conversations, but {meta_path(prefix)} is "
            "missing or of other data: restore it, or tokenize again"
        )
    if dataset.loss_mask is None:
        raise UserError(
            f"data source {name!r} holds conversations, but {mask_path}, which marks their answers, is missing: "
            "restore it, or tokenize again"
        )
    if chat is None:
        raise UserError(
            f"data source {name!r} ({prefix}) holds conversations, rendered by the template {stated['template']!r}: "
            f"write data.chat: {{template: {stated['template']}}}"
        )
    if template_sha256 not in (None, stated["template_sha256"]):
        raise UserError(
            f"data source {name!r} ({prefix}) was rendered by another chat template: {stated['template']!r} with the "
            f"hash {stated['template_sha256'][:12]}; data.chat.template is {chat.template!r} with the hash "
            f"{str(template_sha256)[:12]}. Set it to what the data was made with, or tokenize it again"
        )
    return True


def fit_conversations(
    name: str, dataset: IndexedDataset, documents: NDArray[np.int64], chat: ChatSection, seq_len: int
) -> tuple[NDArray[np.int64], Conversations]:
    """The conversations to learn of `documents`, and how: none is ever cut in two. What is left out is logged."""
    loss_mask = dataset.loss_mask
    assert loss_mask is not None
    too_long = documents[dataset.document_lengths[documents] > seq_len]
    if not len(too_long):
        return documents, Conversations(seq_len, chat.prompt_loss_weight)
    longest = int(dataset.document_lengths[too_long].max())
    dropped = too_long
    if chat.too_long == "truncate":
        # The label of the last token used lies beyond it.
        firsts = dataset.document_starts[too_long] + 1
        dropped = np.array(
            [
                d
                for d, first in zip(too_long, firsts, strict=True)
                if not loss_mask[first : first + seq_len].any()
            ],
            dtype=np.int64,
        )
    what = "dropped" if chat.too_long == "drop" else f"truncated, {len(dropped)} dropped as no answer is left"
    _log.warning(
        "data source %r: %d of %d conversations are longer than train.seq_len = %d tokens (the longest has %d): %s "
        "(data.chat.too_long)",
        *(name, len(too_long), len(documents), seq_len, longest, what),
    )
    conversations = Conversations(seq_len, chat.prompt_loss_weight, len(too_long), len(dropped))
    return documents[~np.isin(documents, dropped)], conversations


def answers_among(
    dataset: IndexedDataset, segments: Sequence[Sequence[int]], num_tokens: int
) -> NDArray[np.bool_]:
    """Which labels of a sample are the assistant's, bool [num_tokens]; padding has none.

    The label of a token is the next one of its document; after the last one anything may stand.

    Args:
        dataset: with a loss mask.
        segments: (document, start, length) of each, one after the other.
        num_tokens: of the sample.
    """
    assert dataset.loss_mask is not None
    is_answer = np.zeros(num_tokens, dtype=np.bool_)
    place = 0
    for document, start, length in segments:
        first = int(dataset.document_starts[document]) + start + 1
        marks = dataset.loss_mask[first : first + length]
        is_answer[place : place + len(marks)] = marks
        place += length
    return is_answer
