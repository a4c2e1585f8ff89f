"""A model that was finetuned on conversations, asked by its chat template: as in training, and up to the end of its
answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.hf.directory import end_token_ids, write_hf_files
from meditron_train.checkpoint.tokenizer.chat import ChatFormat
from meditron_train.config.chat import CHATML_TOKENS
from meditron_train.data.tokenizing.chat import ChatEncoder, chat_template
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.evaluate.harness.lm_task import Protocol
from meditron_train.evaluate.harness.runners import open_runner
from meditron_train.tasks.catalogue import BENCHMARKS
from tests.checkpoint.tiny_llama import change_json, read_tensors, rewrite_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.distributed import run_ranks
from tests.evaluate.asking import ask
from tests.evaluate.harness.test_run import medqa_rows, write_lines
from tests.evaluate.ranks import answer_benchmark
from tests.long import mostly_long
from tests.refusal import refused

SETTINGS: dict[str, Any] = {"device": "cpu", "batch_size": 4, "dtype": "float32", "chat": True}
COT = Protocol(mode="cot", max_new_tokens=8, chat=True)
NUM_TOKENS = VOCAB_SIZE + len(CHATML_TOKENS)
NO_BOS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(directory: Path, template: str | None = None) -> Path:
    """As a run of ChatML exports it: its tokenizer's EOS ends documents, and <|im_end|> ends answers."""
    write_tiny_llama(
        directory, vocab_size=NUM_TOKENS, bos_token_id=1, eos_token_id=2, max_position_embeddings=512
    )
    (directory / "generation_config.json").unlink()
    tokenizer = write_tokenizer_model(directory.with_name(directory.name + "-tokenizer"))
    if template is None:
        source = directory.with_name(directory.name + "-chatml")
        source.mkdir()
        write_hf_files(source, read_hf_config(directory), tokenizer, CHATML_TOKENS)
        template = chat_template("chatml", load_tokenizer(source)).source
    write_hf_files(
        directory,
        read_hf_config(directory),
        tokenizer,
        CHATML_TOKENS,
        ChatFormat(template, CHATML_TOKENS[1]),
    )
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_lines(tmp_path / "data" / "medqa4.jsonl", medqa_rows(3))
    return tmp_path / "data"


def test_an_answer_ends_where_the_generation_settings_say(tmp_path: Path, data: Path) -> None:
    directory = write_chat_model(tmp_path / "model")
    benchmark = BENCHMARKS["medqa4"]
    lm = open_runner("transformers", directory, **SETTINGS)
    (first, *_) = ask(lm, benchmark, data, COT).answers
    prompt = lm.tok_encode(first.prompt)
    ids = greedy(lm.model, prompt, 8)
    # Let the model say <|im_end|> where it said something else, from some token on for the first time.
    place = next(place for place in range(2, 8) if ids[place] not in ids[:place])
    tensors, (end,) = read_tensors(directory), end_token_ids(directory) - {2}
    assert end == VOCAB_SIZE + 1
    head = tensors["lm_head.weight"].clone()
    head[[end, ids[place]]] = head[[ids[place], end]]
    rewrite_tensors(directory, {**tensors, "lm_head.weight": head})

    lm = open_runner("transformers", directory, **SETTINGS)
    expected = ask(lm, benchmark, data, COT).answers
    assert greedy(lm.model, prompt, 8) == [*ids[:place], end]
    ((found,),) = run_ranks(answer_benchmark, 1, directory, {}, data, [("medqa4", COT)])
    assert [answer.generations for answer in found] == [answer.generations for answer in expected]
    assert [answer.prompt for answer in found] == [answer.prompt for answer in expected]


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    import torch

    ids_BS = torch.tensor([prompt])
    output_BS = model.generate(ids_BS, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return output_BS[0, len(prompt) :].tolist()


def test_end_tokens_are_read_as_transformers_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_token_ids(tmp_path) == {2}
    for said, ends in ((None, {2}), (5, {5}), ([5, 7], {5, 7})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert end_token_ids(tmp_path) == ends
    change_json(tmp_path / "generation_config.json", eos_token_id=["</s>"])
    with refused("generation_config.json: eos_token_id is", "an id or a list of ids"):
        end_token_ids(tmp_path)


def encode_on_a_rank(rank: int, world_size: int, directory: Path, texts: list[str]) -> list[list[int]]:
    from meditron_train.config.training import ParallelSection
    from meditron_train.evaluate.harness.runners import open_parallel_runner
    from meditron_train.launcher.environment import detect_launcher

    lm = open_parallel_runner(directory, detect_launcher(os.environ), ParallelSection(), **SETTINGS)
    return [lm.tok_encode(text) for text in texts]


def conversation(directory: Path) -> tuple[str, list[int]]:
    """The text of a request, and its tokens in training."""
    tokenizer = load_tokenizer(directory)
    encoder = ChatEncoder(tokenizer.definition, chat_template("tokenizer", tokenizer))
    text = encoder.request([{"role": "user", "content": "kamo riten"}])
    return text, encoder.encode_text(text)


@pytest.mark.parametrize("template", mostly_long([None, NO_BOS], None), ids=["chatml", "no-bos"])
def test_a_conversation_has_the_tokens_that_training_gives_it(tmp_path: Path, template: str | None) -> None:
    directory = write_chat_model(tmp_path / "model", template)
    text, wanted = conversation(directory)
    assert (wanted[0] == 1) == (template is None)  # the tokenizer itself would put BOS before it
    lm = open_runner("transformers", directory, **SETTINGS)
    assert lm.tok_encode(text) == wanted
    assert lm.tok_batch_encode([text])[0].tolist() == [wanted]


@pytest.mark.long
@pytest.mark.parametrize("template", [None, NO_BOS], ids=["chatml", "no-bos"])
def test_the_parallel_runner_gives_it_the_same_tokens(tmp_path: Path, template: str | None) -> None:
    directory = write_chat_model(tmp_path / "model", template)
    text, wanted = conversation(directory)
    assert run_ranks(encode_on_a_rank, 1, directory, [text]) == [[wanted]]
