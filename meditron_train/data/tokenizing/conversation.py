"""Rows of JSON lines to conversations: `messages` as OpenAI and Hugging Face write them, or question and answer.

Workers import this module: it must stay light.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meditron_train.data.tokenizing.readers import BadLineError, MissingKeyError

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")


def parse_conversation(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row: an optional system message, then user and assistant in turn, an answer last.

    Args:
        row: has `messages`, a list of {role, content}; or `question` and `answer`, and `system` where there is one.

    Raises:
        BadLineError: it is no such conversation; the message counts from 1.
    """
    if "messages" in row:
        messages = [_message(number, value) for number, value in enumerate(_listed(row["messages"]), 1)]
    elif "question" in row:
        messages = _question_and_answer(row)
    else:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise MissingKeyError(f"neither 'messages' nor 'question' and 'answer'; it has {keys}")
    _check_roles([message["role"] for message in messages])
    return messages


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadLineError("'messages' is not a list of messages" if value != [] else "it has no messages")
    return value


def _message(number: int, value: Any) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if role not in _ROLES:
        raise BadLineError(f"message {number} has the role {role!r:.40}; known are {', '.join(_ROLES)}")
    content = value.get("content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": _text(content, f"message {number} ({role})")}


def _question_and_answer(row: Mapping[str, Any]) -> list[Message]:
    messages = [{"role": "system", "content": _text(row["system"], "'system'")}] if row.get("system") else []
    if row.get("answer") in (None, ""):
        raise BadLineError("it has a question and no answer")
    for role, key in (("user", "question"), ("assistant", "answer")):
        messages.append({"role": role, "content": _text(row[key], f"{key!r}")})
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadLineError(f"{what} has no text" + ("" if value in (None, "") else f" but {value!r:.40}"))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLineError(f"{what} is not valid Unicode ({error.reason})") from error
    return value


def _check_roles(roles: list[str]) -> None:
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            before = roles[first + number - 1] if first + number else "the beginning"
            raise BadLineError(
                f"the roles do not alternate: message {first + number + 1} is the {role}'s after {before}, where the "
                f"{wanted}'s is due"
            )
    if roles[-1] != "assistant":
        raise BadLineError(f"there is no answer: the last message is the {roles[-1]}'s")
