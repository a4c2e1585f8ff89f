"""Keys of supervised finetuning: which conversations, and what of them is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from meditron_train.config.section import NUMBER, Section

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
ChatTemplateName = Literal["chatml", "tokenizer"]


class ChatSection(Section):
    """Supervised finetuning on conversations (`data tokenize --chat`). Sources of plain text may stand beside them."""

    template: ChatTemplateName = "chatml"
    """What the conversations were rendered with, and what the exported tokenizer gets.
    chatml: <|im_start|> and <|im_end|>, which are added to special_tokens. tokenizer: the tokenizer's own template."""
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1), NUMBER] = 0.0
    """Weight in the loss of tokens that are not the assistant's, which weigh 1. 0: only answers are learned."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a conversation of more than train.seq_len tokens, which are counted and reported either way.
    truncate: its first seq_len tokens are learned."""


def with_chat_tokens(values: Any) -> Any:
    """The values of a `data` section, with ChatML's tokens among special_tokens where its template is used."""
    if not isinstance(values, dict) or values.get("chat") is None:
        return values
    chat = values["chat"]
    name = chat.get("template", "chatml") if isinstance(chat, dict) else getattr(chat, "template", None)
    tokens = values.get("special_tokens") or ()
    if name != "chatml" or not isinstance(tokens, list | tuple):
        return values
    return {**values, "special_tokens": [*tokens, *(token for token in CHATML_TOKENS if token not in tokens)]}
