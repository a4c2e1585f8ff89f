"""What the console shows before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from meditron_train.checkpoint.hf.config import random_model_config
from meditron_train.config.load import load_config
from meditron_train.train.summary import summarize


@pytest.fixture
def plan(write_config):
    def make(wandb: str):
        config = load_config(
            write_config(train={"global_batch_size": 8, "steps": 20}, logging={"wandb": wandb})
        )
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        return SimpleNamespace(
            config=config,
            model=random_model_config(shape, 1000),
            layout=config.parallel.layout(4),
            train_data=SimpleNamespace(
                epochs=lambda num_samples: {"one": num_samples / 80, "two": 1e-4},
                sources=[],
                conversations_per_sample={},
            ),
        )

    return make


@pytest.mark.parametrize(
    ("wandb", "said"),
    [("disabled", "disabled"), ("offline", "nothing leaves"), ("online", "ONLINE"), ("auto", "ONLINE")],
)
def test_the_summary_says_what_will_happen_and_what_leaves_the_machine(plan, wandb, said):
    text = summarize(plan(wandb), is_resume=False)
    (line,) = (line for line in text.splitlines() if line.strip().startswith("W&B"))
    assert said in line
    assert "4 ranks" in text and "data 4" in text
    assert "20 of 8 samples x 64 = 512 tokens each, 10,240 in all" in text
    assert "one 2.00 epochs, two 1.0e-04 epochs" in text and "continued" not in text


def test_a_resume_is_called_one(plan):
    assert ", continued" in summarize(plan("disabled"), is_resume=True)
