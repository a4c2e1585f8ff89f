"""Supervised finetuning: the loss under packing, what is exported, and a resume."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meditron_train.config.chat import CHATML_TOKENS
from tests.distributed import run_ranks
from tests.train.conftest import WORDS
from tests.train.test_loop import losses, run, stop_file_after

SEQ_LEN = 128


def conversations() -> list[list[dict[str, str]]]:
    """Of one to three turns, some with a system message, of many lengths."""
    dice = random.Random(3)

    def words() -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(1, 6)))

    chats = []
    for number in range(24):
        chat = [{"role": "system", "content": words()}] if number % 3 == 0 else []
        for _ in range(1 + number % 2):
            chat += [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]
        chats.append(chat)
    return chats


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory, hf_dir: Path) -> Path:
    from meditron_train.data.tokenizing.encode import TokenizeOptions
    from meditron_train.data.tokenizing.tokenize import tokenize

    directory = tmp_path_factory.mktemp("chat")
    rows = [json.dumps({"messages": chat}) + "\n" for chat in conversations()]
    (directory / "in.jsonl").write_text("".join(rows))
    options = TokenizeOptions(tokenizer=str(hf_dir), special_tokens=CHATML_TOKENS, chat="chatml")
    tokenize([directory / "in.jsonl"], directory / "chat", options)
    return directory / "chat"


@pytest.fixture
def chat_config(write_config, chat_data: Path, hf_dir: Path, tmp_path: Path):
    """chat_config(section={key: value}, ...) -> path of a configuration that learns the conversations."""

    def write(
        name: str = "config.yaml", run_name: str = "run", chat: dict[str, Any] | None = None, **sections: Any
    ) -> Path:
        values: dict[str, dict[str, Any]] = {
            "data": {
                "tokenizer": str(hf_dir),
                "train": [{"path": str(chat_data)}],
                "validation": [],
                "chat": {"template": "chatml", **(chat or {})},
            },
            "train": {"steps": 4, "seq_len": SEQ_LEN, "micro_batch_size": 1, "global_batch_size": 4,
                      "precision": "fp32", "device": "cpu"},
            "checkpoint": {"interval": 2, "export_hf": True},
            "logging": {"run_dir": str(tmp_path / run_name), "wandb": "disabled", "tensorboard": False},
        }  # fmt: skip
        for section, content in sections.items():
            values[section] = {**values.get(section, {}), **content}
        return write_config(name, **values)

    return write


def packed_loss(rank: int, world_size: int, config_file: Path) -> tuple[float, float, float, float, int]:
    """Loss and gradients of two epochs of the conversations as one global batch."""
    import numpy as np

    from meditron_train.config.load import load_config
    from meditron_train.parallel import initialize
    from meditron_train.train.setup import build_engine, make_plan

    plan = make_plan(load_config(config_file), world_size, rank)
    mesh = initialize(plan.layout, rank=rank, local_rank=rank, device="cpu", timeout_s=60)
    engine = build_engine(plan, mesh, with_weights=True)
    mine = np.arange(2 * plan.train_data.samples_per_epoch)[mesh.at.data :: mesh.layout.data]
    batches = plan.train_data.job(mine[:, None]).gather()
    assert any(len(batch.cu_seqlens) > 3 for batch in batches)  # several conversations share a sample
    loss, weight = engine.evaluate(batches)
    result = engine.compute_gradients(batches)
    return loss, weight / 2, result.loss, result.grad_norm, result.num_loss_tokens // 2


def one_by_one(hf_dir: Path, exported: Path, prompt_weight: float) -> tuple[float, float, float]:
    """(loss, gradient norm, weight) by transformers: the base with rows of the mean added, each conversation alone,
    marked by the exported tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    means = [
        m.weight.detach().double().mean(0).float() for m in (model.get_input_embeddings(), model.lm_head)
    ]
    num_old = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module, mean in zip((model.get_input_embeddings(), model.lm_head), means, strict=True):
            module.weight[num_old:] = mean
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for chat in conversations():
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids = encoded["input_ids"][0]
        marks = torch.as_tensor(encoded["assistant_masks"]).reshape(-1)[1:]
        weights = torch.where(marks.bool(), 1.0, prompt_weight)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum()
        weight += float(weights.sum())
    (total / weight).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return float(total.detach()) / weight, float(norm), weight


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, hf_dir: Path) -> Path:
    """The tokenizer as a run exports it."""
    from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
    from meditron_train.data.tokenizing.chat import chat_template
    from meditron_train.data.tokenizing.tokenizer import load_tokenizer

    directory = tmp_path_factory.mktemp("exported")
    source = chat_template("chatml", load_tokenizer(hf_dir, CHATML_TOKENS)).source
    copy_tokenizer(hf_dir, directory, CHATML_TOKENS, source)
    return directory


@pytest.mark.parametrize(
    ("parallel", "prompt_weight"),
    [
        pytest.param({"tensor": 2, "sequence": True}, 0.0, marks=pytest.mark.long),
        pytest.param({"pipeline": 2}, 0.3, marks=pytest.mark.long),
        ({}, 0.3),  # two data-parallel ranks
        pytest.param({"context": 2}, 0.0, marks=pytest.mark.long),
    ],
    ids=["tp2", "pp2", "dp2", "cp2"],
)
def test_the_loss_under_packing_is_that_of_each_conversation_alone(
    chat_config, hf_dir: Path, exported: Path, parallel: dict, prompt_weight: float
) -> None:
    config = chat_config(parallel=parallel, chat={"prompt_loss_weight": prompt_weight})
    loss, norm, weight = one_by_one(hf_dir, exported, prompt_weight)
    for got in run_ranks(packed_loss, 2, config):
        assert got[0] == pytest.approx(loss, rel=1e-5)
        assert got[1] == pytest.approx(weight, rel=1e-6)
        assert got[2] == pytest.approx(loss, rel=1e-5)
        assert got[3] == pytest.approx(norm, rel=1e-5)


@pytest.mark.long
def test_a_run_exports_what_agrees_and_resumes_bit_for_bit(chat_config, tmp_path: Path, hf_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    whole = run(chat_config("whole.yaml", "whole"))
    config = chat_config()
    stop_file_after(config, tmp_path / "run", step=2, world_size=1)
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert [line["param_norm"] for line in resumed] == [line["param_norm"] for line in whole]
    assert losses(whole)[-1] < losses(whole)[0]

    hf = tmp_path / "run" / "hf"
    tokenizer, model = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf)
    rows = {module.weight.shape[0] for module in (model.get_input_embeddings(), model.lm_head)}
    assert rows == {len(tokenizer)} == {model.config.vocab_size}
    chat = [{"role": "user", "content": "the dose?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|im_start|>user\nthe dose?<|im_end|>\n<|im_start|>assistant\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(hf).eos_token_id == [2, end]
