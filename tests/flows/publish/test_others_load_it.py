"""Programs of others load what is published: transformers 4.x, and TRL, which takes a step of preference training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from meditron_train.flows.publish.publish import Wishes, publish

pytestmark = pytest.mark.long

PROMPT = "the dose of mevatrin"
_LOGITS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
with torch.inference_mode():
    logits = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)(ids).logits
print(json.dumps([transformers.__version__, ids.tolist(), logits.tolist()]))
"""


def test_transformers_4_computes_the_same(run_dir: Path, tmp_path: Path) -> None:
    python = os.environ.get("MEDITRON_TRANSFORMERS_4_PYTHON")
    if python is None:
        pytest.skip("MEDITRON_TRANSFORMERS_4_PYTHON names no Python that has transformers 4")
    publish(run_dir, tmp_path / "out", Wishes())
    command = [python, "-c", _LOGITS, str(tmp_path / "out"), PROMPT]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    version, ids, logits = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPT).input_ids == ids[0]
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(
            torch.tensor(ids)
        ).logits
    torch.testing.assert_close(torch.tensor(logits), ours, rtol=1e-5, atol=1e-5)


def test_trl_takes_a_step_of_preference_training(run_dir: Path, tmp_path: Path) -> None:
    """As docs/guides/publish.md has it."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    publish(run_dir, tmp_path / "out", Wishes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pairs = Dataset.from_list(
        [{"prompt": PROMPT, "chosen": " is four grams a day", "rejected": " is nine"}] * 4
    )
    settings = DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(model=model, args=settings, train_dataset=pairs, processing_class=tokenizer)
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(
        0.6931, abs=1e-3
    )  # -log sigmoid(0): policy and reference are one
    changed = [
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    ]
    assert len(changed) == len(before)
