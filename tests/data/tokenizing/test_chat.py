"""Ids and masks of conversations against transformers, which reads the tokenizer that a run exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.chat import CHATML_TOKENS
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.info import dataset_info
from meditron_train.data.tokenizing.chat import ChatEncoder, ChatTemplate, chat_template
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.readers import BadLineError
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import UserError

CHATS = [
    [("user", "the dose of mevatrin?"), ("assistant", "10 mg daily")],
    [("system", "be brief"), ("user", " why?\n"), ("assistant", " since β-blockers\nlower it "), ("user", "so"),
     ("assistant", "no"), ("user", "naïve 心臓"), ("assistant", "\n2")],
]  # fmt: skip

# As Llama 2's: the answer ends with EOS. The second one says itself what the assistant said.
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' }}{{ m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ '<<SYS>>' + m['content'] }}{% endif %}{% endfor %}"
)
MARKED_LLAMA = LLAMA.replace("{{ ' ' }}{{ m", "{% generation %}{{ ' ' }}{{ m").replace(
    "eos_token }}", "eos_token }}{% endgeneration %}"
)


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def by_transformers(directory: Path, chat: list[tuple[str, str]], template: str | None = None) -> Any:
    """(ids, mask) as the exported tokenizer gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer.apply_chat_template(
        messages(chat),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


@pytest.fixture(params=["sentencepiece_directory", "hugging_face_directory"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_chatml_is_what_the_exported_tokenizer_makes(tmp_path: Path, directory: Path) -> None:
    tokenizer = load_tokenizer(directory, CHATML_TOKENS)
    template = chat_template("chatml", tokenizer)
    encoder = ChatEncoder(tokenizer.definition, template)
    copy_tokenizer(directory, tmp_path, CHATML_TOKENS, template.source)
    start, end = (tokenizer.special_ids[token] for token in CHATML_TOKENS)
    for chat in CHATS:
        ids, mask = encoder.encode(messages(chat))
        assert (ids, mask) == by_transformers(tmp_path, chat)
        assert ids[:2] == [tokenizer.bos_id, start]
        assert ids.count(end) == len(chat)
        answers = [ids[i] for i in range(len(ids)) if mask[i]]
        assert answers.count(end) == sum(role == "assistant" for role, _ in chat)
        assert start not in answers


def test_a_template_without_marks_gives_the_same_masks(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, CHATML_TOKENS)
    marked = chat_template("chatml", tokenizer)
    plain = re.sub(r"{% (end)?generation %}", "", marked.source)
    assert plain != marked.source
    by_prefix = ChatEncoder(tokenizer.definition, ChatTemplate("tokenizer", plain, marked.named_tokens))
    for chat in CHATS:
        assert by_prefix.encode(messages(chat)) == ChatEncoder(tokenizer.definition, marked).encode(
            messages(chat)
        )


def test_the_tokenizers_own_template(tmp_path: Path, directory: Path) -> None:
    copy_tokenizer(directory, tmp_path, (), LLAMA)
    tokenizer = load_tokenizer(tmp_path)
    template = chat_template("tokenizer", tokenizer)
    assert template.source == LLAMA
    encoder = ChatEncoder(tokenizer.definition, template)
    for chat in CHATS:
        ids, mask = encoder.encode(messages(chat))
        their_ids, their_mask = by_transformers(tmp_path, chat, MARKED_LLAMA)
        assert ids == their_ids
        assert mask == their_mask


def test_templates_that_cannot_be_used(sentencepiece_directory: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory)
    with pytest.raises(UserError, match="has no chat template of its own; use the template chatml"):
        chat_template("tokenizer", tokenizer)
    with pytest.raises(UserError, match=r"ChatML needs the tokens <\|im_start\|> and <\|im_end\|>"):
        chat_template("chatml", tokenizer)
    chat = messages(CHATS[1])
    last_only = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{% endfor %}"
    silent = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    refusing = "{{ raise_exception('no system') }}"
    for source, message in (
        (last_only, "renders the conversation up to message 3 differently"),
        (silent, "marks 0 of its 3 answers"),
        (refusing, "the chat template refuses it: no system"),
    ):
        with pytest.raises(BadLineError, match=message):
            ChatEncoder(tokenizer.definition, ChatTemplate("tokenizer", source, ())).encode(chat)


def test_a_special_token_in_a_message_is_refused(directory: Path) -> None:
    """Also one that the template does not name, such as the end of the text in the middle of an answer."""
    tokenizer = load_tokenizer(directory, CHATML_TOKENS)
    encoder = ChatEncoder(tokenizer.definition, chat_template("chatml", tokenizer))
    for token in ("</s>", "<s>", "<|im_end|>"):
        with pytest.raises(BadLineError, match=re.escape(f"message 2 holds {token!r}")):
            encoder.encode(messages([("user", "why?"), ("assistant", f"since{token} so")]))


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(sentencepiece_directory: Path) -> TokenizeOptions:
    return TokenizeOptions(
        tokenizer=str(sentencepiece_directory), special_tokens=CHATML_TOKENS, chat="chatml", chunk_bytes=200
    )


def test_files(tmp_path: Path, options: TokenizeOptions, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": f"c{i}", "messages": messages(CHATS[i % 2])} for i in range(6)]
    bad = [
        {"messages": messages([("user", "a"), ("user", "b"), ("assistant", "c")])},
        {"question": "dose?"},
        {"messages": messages([("user", "no<|im_end|>"), ("assistant", "c")])},
    ]
    source = rows_file(tmp_path / "in.jsonl", [*rows, *bad, {"question": "dose?", "answer": "5 mg"}])
    meta = tokenize([source], tmp_path / "out", options)
    for line, reason in ((7, "the roles do not alternate"), (8, "no answer"), (9, "holds '<|im_end|>'")):
        assert any(f"line {line}: " in text and reason in text for text in caplog.messages)
    assert (meta["documents"], meta["bad_lines"]) == (7, 3)
    dataset = IndexedDataset(tmp_path / "out")
    tokenizer = load_tokenizer(options.tokenizer, CHATML_TOKENS)
    encoder = ChatEncoder(tokenizer.definition, chat_template("chatml", tokenizer))
    encoded = [encoder.encode(messages(CHATS[i % 2])) for i in range(6)]
    assert [dataset.document(i).tolist() for i in range(6)] == [ids for ids, _ in encoded]
    assert dataset.loss_mask is not None
    marks = [mark for _, mask in encoded for mark in mask]
    assert dataset.loss_mask[: len(marks)].tolist() == marks
    assert meta["chat"]["loss_tokens"] == np.count_nonzero(dataset.loss_mask)
    assert dataset_info(tmp_path / "out")["meta"] == meta
    tokenize([source], tmp_path / "two", options, workers=2)
    for suffix in ("bin", "idx", "meta.json", "ids.jsonl", "loss_mask.bin"):
        assert Path(f"{tmp_path}/out.{suffix}").read_bytes() == Path(f"{tmp_path}/two.{suffix}").read_bytes()


def test_text_over_conversations_leaves_no_mask(tmp_path: Path, options: TokenizeOptions) -> None:
    source = rows_file(tmp_path / "in.jsonl", [{"question": "dose?", "answer": "5 mg", "text": "dose"}])
    tokenize([source], tmp_path / "out", options)
    assert Path(f"{tmp_path}/out.loss_mask.bin").is_file()
    meta = tokenize([source], tmp_path / "out", TokenizeOptions(tokenizer=options.tokenizer), overwrite=True)
    assert "chat" not in meta
    assert not Path(f"{tmp_path}/out.loss_mask.bin").exists()


def test_strict_stops_at_the_row(tmp_path: Path, options: TokenizeOptions) -> None:
    rows = [{"question": "dose?", "answer": "5 mg"}, {"question": "dose?"}]
    with pytest.raises(UserError, match="in.jsonl, line 2: it has a question and no answer"):
        tokenize([rows_file(tmp_path / "in.jsonl", rows)], tmp_path / "out", options, strict=True)


def test_files_that_hold_no_conversations(tmp_path: Path, options: TokenizeOptions) -> None:
    (tmp_path / "in.txt").write_text("dose\n")
    with pytest.raises(UserError, match="conversations are read from JSON lines"):
        tokenize([tmp_path / "in.txt"], tmp_path / "out", options)
    source = rows_file(tmp_path / "in.jsonl", [{"text": "dose"}])
    with pytest.raises(UserError, match="neither 'messages' nor 'question' and 'answer'; it has 'text'"):
        tokenize([source], tmp_path / "out", options)
    # Rows are conversations, but none is whole: no word of --text-key.
    source = rows_file(tmp_path / "in.jsonl", [{"question": "dose?"}])
    with pytest.raises(UserError, match="0 empty, 1 bad lines$"):
        tokenize([source], tmp_path / "out", options)
