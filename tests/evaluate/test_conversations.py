"""What is learned from a benchmark's training file is what an evaluation asks, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.chat import CHATML_TOKENS
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.tokenizing.chat import chat_template
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import UserError
from meditron_train.evaluate.conversations import Written, write_conversations
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.parse_answer import parse_answer
from meditron_train.tasks.catalogue import BENCHMARKS, read_prompt
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.evaluate.asking import ask

ROWS = {
    "medqa4": [
        {"question": f"Which kamo is {i}?", "options": {"A": "zu", "B": "pa", "C": "ri", "D": "ta"},
         "answer_idx": "ABCD"[i % 4], "explanation": "Since kamo."}
        for i in range(4)
    ],
    "medmcqa": [
        {"id": f"m{i}", "question": f"Which ten is {i}? ", "opa": "zu", "opb": "pa", "opc": "ri", "opd": "ta",
         "cop": i % 4, "exp": "Ten is so.\nAnd more." if i else None}
        for i in range(4)
    ],
    "mmlu": [
        {"question": f"Which lex is {i}?", "choices": ["zu", "pa", "ri", "ta"], "answer": i % 4,
         "subject": "college_biology", "explanation": "Since lex."}
        for i in range(2)
    ],
    "pubmedqa": [
        {"pubid": i, "question": f"Is lex {i}?", "context": {"contexts": ["One.", "Two."]},
         "final_decision": ("yes", "no", "maybe")[i % 3], "long_answer": "Lex is in dex."}
        for i in range(4)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as supervised finetuning exports one."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer_model(directory / "base")
    source = chat_template("chatml", load_tokenizer(tokenizer, CHATML_TOKENS)).source
    hf = write_tiny_llama(
        directory / "hf",
        vocab_size=VOCAB_SIZE + 2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=1024,
    )
    copy_tokenizer(tokenizer, hf, CHATML_TOKENS, source)
    return hf


@pytest.fixture(scope="module")
def runner(model: Path) -> Any:
    pytest.importorskip("lm_eval")
    from meditron_train.evaluate.harness.runners import open_runner

    return open_runner("transformers", model, device="cpu", batch_size=4, dtype="float32")


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("cot", [False, True], ids=["likelihood", "cot"])
@pytest.mark.parametrize("task", ROWS)
def test_the_prompt_learned_is_the_prompt_asked(
    tmp_path: Path, model: Path, runner: Any, task: str, cot: bool
) -> None:
    rows = [row for row in ROWS[task] if not cot or row.get("exp", True)]
    file = rows_file(tmp_path / "data" / task / "test.jsonl", rows)
    written = write_conversations(file, BENCHMARKS[task], tmp_path / "chat.jsonl", with_reasons=cot)
    assert written == Written(len(rows), 0)
    options = TokenizeOptions(tokenizer=str(model), special_tokens=CHATML_TOKENS, chat="chatml")
    tokenize([tmp_path / "chat.jsonl"], tmp_path / "chat", options)
    dataset = IndexedDataset(tmp_path / "chat")
    protocol = Protocol("cot" if cot else "likelihood", chat=True, max_new_tokens=1)
    score = ask(runner, BENCHMARKS[task], tmp_path / "data", protocol)
    prompt = read_prompt(BENCHMARKS[task].prompt, with_reasons=cot)
    for number, answer in enumerate(score.answers):
        ids = dataset.document(number).tolist()
        first = int(dataset.document_starts[number])
        mask = dataset.loss_mask[first : first + len(ids)].tolist()
        asked = runner.tok_encode(answer.prompt)
        assert ids[: len(asked)] == asked
        assert mask.index(1) == len(asked)
        learned = [token for token, mark in zip(ids, mask, strict=True) if mark]
        text = runner.tokenizer.decode(learned, skip_special_tokens=True)
        options_shown = ("yes", "no", "maybe") if task == "pubmedqa" else "ABCD"
        if cot:
            assert parse_answer(text, prompt, options_shown) == answer.answer
        else:
            whole = runner.tok_encode(answer.prompt + options_shown[answer.answer])
            assert [*asked, *learned][: len(whole)] == whole
            assert len(learned) == len(whole) - len(asked) + 1  # and the end of the turn


def test_rows_without_an_explanation_are_counted(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "train.jsonl", ROWS["medmcqa"])
    written = write_conversations(file, BENCHMARKS["medmcqa"], tmp_path / "out.jsonl", with_reasons=True)
    assert written == Written(3, 1)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["id"] == "m1"
    assert first["messages"][1]["content"] == "Ten is so.\nAnd more.\nThe answer is B."
    bare = [{key: value for key, value in row.items() if key != "explanation"} for row in ROWS["medqa4"]]
    with pytest.raises(UserError, match="none of the 4 rows of medqa4 explains its answer"):
        write_conversations(
            rows_file(file, bare), BENCHMARKS["medqa4"], tmp_path / "no.jsonl", with_reasons=True
        )


def test_a_row_without_answer_is_named(tmp_path: Path) -> None:
    rows = [
        ROWS["medqa4"][0],
        {key: value for key, value in ROWS["medqa4"][1].items() if key != "answer_idx"},
    ]
    file = rows_file(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match="row 2 is not of the format of medqa4 .* it has no 'answer_idx'"):
        write_conversations(file, BENCHMARKS["medqa4"], tmp_path / "out.jsonl", with_reasons=False)
    with pytest.raises(UserError, match="would take the place of"):
        write_conversations(file, BENCHMARKS["medqa4"], file, with_reasons=False)


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from meditron_train.evaluate.harness.runners import open_runner
    from tests.evaluate.models import write_tiny_model

    rows_file(tmp_path / "data" / "medqa4.jsonl", ROWS["medqa4"])
    runner = open_runner(
        "transformers", write_tiny_model(tmp_path / "hf"), device="cpu", batch_size=4, dtype="float32"
    )
    with pytest.raises(UserError, match="the tokenizer of the model has no chat template"):
        ask(runner, BENCHMARKS["medqa4"], tmp_path / "data", Protocol(chat=True))
