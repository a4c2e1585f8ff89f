from __future__ import annotations

import pytest

from meditron_train.data.tokenizing.conversation import parse_conversation
from meditron_train.data.tokenizing.readers import BadLineError


def chat(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]}


def test_both_conventions() -> None:
    row = {"system": "be brief", "question": "dose?", "answer": "5 mg", "id": 3}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "dose?"},
        {"role": "assistant", "content": "5 mg"},
    ]
    assert parse_conversation(row) == parse_conversation({"messages": messages}) == messages
    parts = [{"type": "text", "text": "do"}, {"type": "text", "text": "se?"}]
    in_parts = [messages[0], {"role": "user", "content": parts}, messages[2]]
    assert parse_conversation({"messages": in_parts}) == messages
    assert parse_conversation({**row, "system": None}) == messages[1:]


def test_several_turns() -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    assert tuple(message["role"] for message in parse_conversation(chat(*roles))) == roles


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("user", "user", "assistant"), "do not alternate: message 2 is the user's after user, where"),
        (chat("assistant"), "message 1 is the assistant's after the beginning, where the user's is due"),
        (chat("user", "assistant", "system", "user"), "message 3 is the system's after assistant"),
        (chat("user", "assistant", "user"), "there is no answer: the last message is the user's"),
        (chat("system"), "there is no answer: the last message is the system's"),
        (chat("user", "tool"), "message 2 has the role 'tool'; known are system, user, assistant"),
        ({"messages": []}, "it has no messages"),
        ({"messages": "hello"}, "'messages' is not a list of messages"),
        ({"messages": ["hello"]}, "message 1 has the role None"),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 \(user\) has no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"message 1 \(user\) has no text but",
        ),
        ({"question": "dose?"}, "it has a question and no answer"),
        ({"question": "dose?", "answer": ""}, "it has a question and no answer"),
        ({"question": " ", "answer": "5 mg"}, "'question' has no text"),
        ({"question": "dose?", "answer": 5}, "'answer' has no text but 5"),
        ({"question": "\ud800", "answer": "5 mg"}, "'question' is not valid Unicode"),
        ({"text": "dose"}, "neither 'messages' nor 'question' and 'answer'; it has 'text'"),
    ],
)
def test_what_is_no_conversation(row: dict, message: str) -> None:
    with pytest.raises(BadLineError, match=message):
        parse_conversation(row)
