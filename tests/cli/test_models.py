"""Every verb that takes a model says the same where it is given none."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from meditron_train.cli.main import app
from tests.refusal import refused

HUB_ID = "meta-llama/Llama-2-7b-hf"
CONFIG = f"""
model: {{from: {HUB_ID}}}
data: {{tokenizer: {HUB_ID}, train: [{{name: m, path: data/m}}]}}
"""

TAKES_A_MODEL = {
    "hf-to-megatron": ["convert", "hf-to-megatron", "MODEL", "out"],
    "megatron-to-hf": ["convert", "megatron-to-hf", "MODEL", "out"],
    "megatron-to-hf --vocab-size": ["convert", "megatron-to-hf", "MODEL", "out", "--vocab-size", "9"],
    "reshard": ["convert", "reshard", "MODEL", "out"],
    "verify": ["convert", "verify", "MODEL", "MODEL"],
    "inspect": ["convert", "inspect", "MODEL"],
    "generate": ["generate", "MODEL", "--prompt", "a", "--device", "cpu"],
    "evaluate": ["evaluate", "MODEL", "--tasks", "medqa4"],
    "data tokenize": ["data", "tokenize", "a.jsonl", "--tokenizer", "MODEL", "--output", "out"],
    "train": ["train", "c.yaml"],
}
"""MODEL stands for the directory."""


def run(words: list[str], model: str) -> None:
    typer.main.get_command(app).main(
        [model if word == "MODEL" else word for word in ["--debug", *words]], standalone_mode=False
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "a"}\n')
    Path("c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize("words", TAKES_A_MODEL.values(), ids=TAKES_A_MODEL)
def test_the_id_of_a_model_on_the_hub_gets_the_command_that_fetches_it(words: list[str]) -> None:
    with refused(f"hf download {HUB_ID} --local-dir models/Llama-2-7b-hf"):
        run(words, HUB_ID)


@pytest.mark.parametrize(
    "words", [words for name, words in TAKES_A_MODEL.items() if name not in ("data tokenize", "train")]
)
@pytest.mark.parametrize(
    "beside", [(), ("config.json", "model.safetensors")], ids=["alone", "beside weights"]
)
def test_an_adapter_is_named_as_such(words: list[str], beside: tuple[str, ...], here: Path) -> None:
    from tests.checkpoint.tiny_llama import write_tiny_llama

    write_tiny_llama(here / "whole")
    (here / "adapter").mkdir()
    for name in beside:
        (here / "whole" / name).rename(here / "adapter" / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (here / "adapter" / name).write_text("{}")
    if "--vocab-size" in words:
        words = words[:-2]
    with refused("adapter of PEFT", "merge_and_unload"):
        run(words, "adapter")
