"""Runs that train adapters: what they save, how they resume, what they refuse, and what is made of the result."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import Command
from tests.refusal import refused
from tests.train.test_failures import failure
from tests.train.test_loop import kill_when, losses, run

LORA = {"rank": 2, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj"]}
SETTINGS = {"train": {"steps": 9}, "checkpoint": {"interval": 3, "export_hf": True}, "lora": LORA}


@pytest.fixture
def short(write_config, tmp_path):
    """short(name, **sections) → a run of 9 steps with adapters in tmp_path/name."""

    def write(name: str, **sections) -> Path:
        values = {name: section for name, section in {**SETTINGS, **sections}.items() if section is not None}
        logging = {"run_dir": str(tmp_path / name)}
        return write_config(f"{name}.yaml", **values, logging=logging, validation={"interval": 100})

    return write


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()


def command(*words: object) -> tuple[int, str, str]:
    import os

    process = Command(*words, environment=dict(os.environ))
    out, err = process.communicate(120)
    return process.returncode, out, err


@pytest.mark.long
def test_a_killed_run_resumes_bit_identically_from_a_small_checkpoint(short, tmp_path, hf_dir):
    from meditron_train.checkpoint.base_weights import open_base, weights_sha256
    from meditron_train.checkpoint.sharded.read import read_meta
    from meditron_train.checkpoint.sharded.torch_dist import TorchDistTensors

    # The dropout's masks too must be those of the uninterrupted run.
    lora = {"lora": {**LORA, "dropout": 0.1}}
    whole = run(short("whole", **lora), "parallel.tensor=2", world_size=2)
    config = short("killed", **lora)
    kill_when(config, tmp_path / "killed", step=5)
    resumed = run(config, "parallel.tensor=2", world_size=2)
    tail = [line for line in resumed if line["step"] > 3]
    assert losses(resumed)[:3] == pytest.approx(losses(whole)[:3], rel=1e-5), "killed in one process"
    assert losses(tail) == pytest.approx(losses(whole)[3:], rel=1e-5), "resumed in two"

    checkpoint = newest(tmp_path / "whole")
    tensors = TorchDistTensors(checkpoint, read_once=True)
    names = tensors.names
    of_model = [name for name in names if not name.startswith("optimizer.")]
    assert len(of_model) == 2 * 4 * 2 and all("_lora_" in name for name in names)
    num_bytes = sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in names)
    assert num_bytes < (hf_dir / "model.safetensors").stat().st_size / 8
    base = read_meta(checkpoint)["base"]
    assert base == {"directory": str(hf_dir.resolve()), "weights_sha256": weights_sha256(open_base(hf_dir))}


def test_resuming_in_the_same_layout_changes_no_bit(short, tmp_path):
    lora = {"lora": {**LORA, "dropout": 0.1}}
    whole = run(short("whole", **lora))
    config = short("killed", **lora)
    kill_when(config, tmp_path / "killed", step=5)
    resumed = run(config)
    for key in ("loss", "grad_norm", "param_norm"):
        assert [line[key] for line in resumed] == [line[key] for line in whole], key
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def trained(short, tmp_path, hf_dir):
    run(short("run", optimizer={"lr": 3e-2}))
    return tmp_path / "run"


def logits(model, ids=((1, 5, 9, 30, 31, 32, 33, 2),)) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits


def test_peft_and_the_merged_model_compute_the_same(trained, tmp_path, hf_dir):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded

    base = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, trained / "adapter").eval())
    assert (adapted - plain).abs().max() > 1e-2, "the adapter does something"

    code, _, err = command("convert", "merge-adapter", hf_dir, trained / "adapter", tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - adapted).abs().max() <= 1e-5

    # Exactly W + scale·B·A, in an order of computation of its own; what is not adapted is the same to the bit.
    before, after = (load_file(d / "model.safetensors") for d in (hf_dir, tmp_path / "merged"))
    factors = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, weight in before.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{place}.lora_A.weight" in factors:
            a, b = (factors[f"{place}.lora_{half}.weight"].double() for half in "AB")
            expected = (weight.double() + 2.0 * torch.einsum("or,ri->oi", b, a)).float()
        assert torch.equal(after[name], expected), name

    # The same base as a sharded checkpoint, and the run's checkpoint instead of the export.
    hf_to_sharded(hf_dir, tmp_path / "sharded")
    code, _, err = command(
        "convert", "merge-adapter", tmp_path / "sharded", newest(trained), tmp_path / "merged2"
    )
    assert code == 0, err
    again = load_file(tmp_path / "merged2" / "model.safetensors")
    assert after.keys() == again.keys() and all(torch.equal(after[name], again[name]) for name in after)


def test_an_adapter_is_described_run_and_refused_for_another_base(trained, tmp_path, hf_dir):
    from safetensors.torch import load_file, save_file

    adapter = trained / "adapter"
    code, out, err = command("convert", "inspect", adapter, "--json")
    said = json.loads(out)
    assert code == 0 and said["format"] == "adapter, PEFT" and said["num_tensors"] == 16, err
    assert said["base"]["directory"] == str(hf_dir.resolve())
    code, out, _ = command("convert", "inspect", newest(trained))
    assert code == 0 and "adapter, sharded" in out

    code, out, err = command("generate", trained, "--prompt", "the dose", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("the dose"), err

    other = tmp_path / "other"
    shutil.copytree(hf_dir, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 2**-10
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("convert", "merge-adapter", other, adapter, tmp_path / "merged")
    assert code == 2 and "is an adapter for another base" in err and not (tmp_path / "merged").exists()

    for words in (("verify", adapter, hf_dir), ("megatron-to-hf", newest(trained), tmp_path / "hf")):
        code, _, err = command("convert", *words)
        assert code == 2 and "merge-adapter" in err


@pytest.mark.long
def test_a_run_refuses_another_base_other_adapters_and_new_tokens(short, tmp_path, hf_dir):
    base = tmp_path / "base"
    shutil.copytree(hf_dir, base)
    model = {"model": {"from": str(base)}}
    run(short("run", train={"steps": 3}, **model))
    assert "rank: 2 -> 4" in failure(short("run", **model, lora={**LORA, "rank": 4}))
    assert "adapters alone" in failure(short("run", **model, lora=None))
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        sign = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([sign ^ 0x80]))
    assert "adapters for other weights" in failure(short("run", **model))
    message = failure(short("tokens", data={"special_tokens": ["<|im_start|>", "<|im_end|>"]}))
    assert "convert add-tokens" in message


@pytest.mark.long
def test_a_base_with_more_tokens_trains_without_growing(short, tmp_path, hf_dir):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    code, _, err = command(
        "convert",
        "add-tokens",
        hf_dir,
        tmp_path / "grown",
        "--token",
        "<|im_start|>",
        "--token",
        "<|im_end|>",
    )
    assert code == 0 and "2 new rows" in err
    before, after = (load_file(d / "model.safetensors") for d in (hf_dir, tmp_path / "grown"))
    for name, weight in before.items():
        assert torch.equal(after[name][: len(weight)], weight)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = weight.double().mean(dim=0).float()
            assert all(torch.equal(row, mean) for row in after[name][len(weight) :]), name
            assert len(after[name]) == len(weight) + 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == len(before["lm_head.weight"]) + 1
    grown = {"model": {"from": str(tmp_path / "grown")}, "data": {"tokenizer": str(tmp_path / "grown")}}
    run(short("run", train={"steps": 3}, **grown))
    said = json.loads((tmp_path / "run" / "adapter" / "manifest.json").read_text())
    assert said["base"]["directory"] == str((tmp_path / "grown").resolve())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": "many"}, "lora_alpha"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(change, message, tmp_path):
    from safetensors.torch import save_file

    from meditron_train.checkpoint.adapters import open_adapter

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.model.layers.0.mlp.up_proj.lora"
    save_file(
        {f"{place}_A.weight": torch.zeros(2, 3), f"{place}_B.weight": torch.zeros(4, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    with refused(message):
        open_adapter(tmp_path)
