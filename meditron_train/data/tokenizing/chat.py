"""Conversations to token ids and a loss mask, rendered by transformers' own `apply_chat_template`.

Workers import this module: transformers is imported where a conversation is first encoded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from meditron_train.config.chat import CHATML_TOKENS, ChatTemplateName
from meditron_train.data.tokenizing.conversation import Message
from meditron_train.data.tokenizing.readers import BadLineError
from meditron_train.data.tokenizing.tokenizer import Definition, Tokenizer, tokenizer_of
from meditron_train.errors import UserError
from meditron_train.tokenizer.reading import read_tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# An answer ends with <|im_end|>; the newline after it belongs to nobody.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes text.

    Attributes:
        name: as `data.chat.template` has it.
        source: in Jinja.
        named_tokens: ("bos_token", "<s>") and so on, which the source may use.
    """

    name: ChatTemplateName
    source: str
    named_tokens: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Hexadecimal, of all that decides what a conversation is rendered to."""
        text = "\0".join([self.source, *(f"{name}={token}" for name, token in self.named_tokens)])
        return hashlib.sha256(text.encode()).hexdigest()


def chat_template(name: ChatTemplateName, tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML, which begins with BOS where the tokenizer does; or the tokenizer's own default template.

    Raises:
        UserError: the tokenizer has none, or lacks a token that ChatML needs.
    """
    reading = read_tokenizer(tokenizer.directory)
    named = tuple(
        sorted((key, token) for key, token in reading.named_tokens.items() if isinstance(token, str))
    )
    if name == "chatml":
        missing = [token for token in CHATML_TOKENS if not tokenizer.has_token(token)]
        if missing:
            raise UserError(
                f"ChatML needs the tokens {' and '.join(missing)}, which {tokenizer.directory} does not have: name "
                "them as special tokens"
            )
        bos = dict(named).get("bos_token")
        begin = "{{ bos_token }}" if bos is not None and tokenizer.adds_bos else ""
        return ChatTemplate(name, begin + _CHATML, (("bos_token", bos),) if bos and begin else ())
    if "default" not in reading.templates:
        raise UserError(
            f"{tokenizer.directory}: its tokenizer has no chat template of its own; use the template chatml"
        )
    return ChatTemplate(name, reading.templates["default"][0], named)


class ChatEncoder:
    """Encodes conversations exactly as the exported tokenizer's `apply_chat_template` does."""

    def __init__(self, definition: Definition, template: ChatTemplate) -> None:
        self._definition, self._template = definition, template

    @cached_property
    def dtype(self) -> np.dtype:
        """How ids are stored: as `Tokenizer.dtype`."""
        return tokenizer_of(self._definition).dtype

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        backend = Backend.from_str(self._definition.backend)
        named = dict(self._template.named_tokens)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self._template.source,
            clean_up_tokenization_spaces=False,
            **named,
        )

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Tokens that no message may hold: all special ones, and those by which the template divides a conversation."""
        named = {token for _, token in self._template.named_tokens}
        return [
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special or token.content in self._template.source or token.content in named
        ]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and for each 1 where it is the assistant's, else 0.

        Raises:
            BadLineError: a message holds a control token, such as one that would end it, or the template cannot render
                the conversation, or does not show where an answer lies.
        """
        for number, message in enumerate(messages, 1):
            for token in self._control_tokens:
                if token in message["content"]:
                    raise BadLineError(
                        f"message {number} holds {token!r}, which is a control token of the tokenizer"
                    )
        from jinja2 import TemplateError

        try:
            ids, mask = (
                self._marked(messages)
                if _GENERATION.search(self._template.source)
                else self._by_prefix(messages)
            )
        except TemplateError as error:
            raise BadLineError(f"the chat template refuses it: {error}") from error
        num_answers = sum(message["role"] == "assistant" for message in messages)
        num_found = sum(value for value, _ in groupby(mask))
        if num_found != num_answers:
            raise BadLineError(f"the chat template marks {num_found} of its {num_answers} answers")
        return ids, mask

    def _marked(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """By a template that marks what the assistant says with {% generation %}."""
        encoded = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _by_prefix(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """By another template: an answer is what it adds to the conversation that ends with the request for it.

        White space after the answer and its end token is not part of it.
        """
        text = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.request(messages[:number])
                after = self._render(messages[: number + 1]).rstrip()
                if not after.startswith(before) or not text.startswith(after):
                    raise BadLineError(
                        f"the chat template renders the conversation up to message {number + 1} differently than "
                        "within the whole, so that its answers cannot be told apart: mark them in it with "
                        "{% generation %}"
                    )
                spans.append((len(before), len(after)))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(first < end and start < max(last, first + 1) for start, end in spans))
            for first, last in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), mask

    def request(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant answers the last message."""
        return self._render(messages, add_generation_prompt=True)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a rendered text, control tokens included."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
