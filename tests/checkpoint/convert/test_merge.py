"""The average of checkpoints: against exact rational arithmetic, under its memory limit, and what is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.convert.engine import Limits, resident_num_bytes
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.merge import merge_checkpoints
from meditron_train.checkpoint.convert.merge_weights import parse_weights
from meditron_train.checkpoint.convert.workspace import Workspace
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.files import sha256_file
from meditron_train.launcher.environment import detect_launcher
from meditron_train.launcher.rendezvous import meet
from meditron_train.verify.verify import verify
from tests.checkpoint.sharded.test_read import write_checkpoint
from tests.checkpoint.tiny_llama import (
    assert_same_bits,
    change_json,
    read_tensors,
    rewrite_tensors,
    write_tiny_llama,
)
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.distributed import run_ranks
from tests.refusal import refused


def write_models(root: Path, number: int, **changes: object) -> list[Path]:
    """Models of one shape with different weights of very different sizes."""
    models = []
    for seed in range(number):
        directory = write_tiny_llama(root / f"model_{seed}", seed=seed, **changes)
        tensors = read_tensors(directory)
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            tensor.mul_(torch.exp2(torch.randint(-12, 8, tensor.shape, generator=generator)).to(tensor.dtype))
        rewrite_tensors(directory, tensors)
        models.append(directory)
    return models


def assert_average(merged: Path, models: Sequence[Path], weights: Sequence[Fraction]) -> None:
    """Within the bound that merge.py states, against rational arithmetic; for bf16, one more rounding."""
    dice, got, parents = random.Random(0), read_tensors(merged), [read_tensors(model) for model in models]
    assert got.keys() == parents[0].keys()
    for name, tensor in got.items():
        columns = [parent[name].reshape(-1) for parent in parents]
        for index in dice.sample(range(tensor.numel()), min(100, tensor.numel())):
            terms = [w * Fraction(column[index].item()) for w, column in zip(weights, columns, strict=True)]
            exact = sum(terms, Fraction(0))
            bound = abs(exact) / 2**24 + (len(terms) + 1) * sum(map(abs, terms)) / 2**53
            if tensor.dtype == torch.bfloat16:
                bound += abs(exact) / 2**8
            error = abs(Fraction(tensor.reshape(-1)[index].item()) - exact)
            assert error <= bound * Fraction(1001, 1000), (name, index, float(error / bound))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_as_exact_as_stated(tmp_path: Path, dtype: str) -> None:
    models = write_models(tmp_path, 3, dtype=dtype)
    hf_to_sharded(models[1], tmp_path / "sharded")  # both kinds of checkpoint, with joint tensors and padding
    mixed = [models[0], tmp_path / "sharded", models[2]]
    merge_checkpoints(mixed, tmp_path / "uniform")
    assert_average(tmp_path / "uniform", models, [Fraction(1, 3)] * 3)
    merge_checkpoints(mixed, tmp_path / "given", weights="0.5,1/3,1/6", max_shard_size="60KB")
    assert_average(tmp_path / "given", models, [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)])
    assert len(list((tmp_path / "given").glob("*.safetensors"))) > 1
    assert read_hf_config(tmp_path / "given") == read_hf_config(models[0])
    merge_checkpoints(mixed, tmp_path / "fp32", dtype="fp32")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "fp32").values()} == {torch.float32}
    assert_average(tmp_path / "fp32", models, [Fraction(1, 3)] * 3)


def test_the_average_of_equal_models_is_that_model(tmp_path: Path) -> None:
    (model,) = write_models(tmp_path, 1, tie_word_embeddings=True)
    copies = [shutil.copytree(model, tmp_path / f"copy_{number}") for number in range(3)]
    merge_checkpoints(copies, tmp_path / "merged", weights="0.2,0.3,0.5")
    want, got = read_tensors(model), read_tensors(tmp_path / "merged")
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)
    assert verify(model, tmp_path / "merged", logits=True).differences == ()


def test_ema_goes_by_the_steps_of_the_run(tmp_path: Path) -> None:
    models = write_models(tmp_path, 3)
    for model, step in zip(models, (300, 100, 200), strict=True):
        hf_to_sharded(model, tmp_path / f"step_{step}")
        change_step(tmp_path / f"step_{step}", step)
    order = [tmp_path / f"step_{step}" for step in (300, 100, 200)]
    used = merge_checkpoints(order, tmp_path / "merged", weights="ema:0.75")
    tensors = [read_tensors(models[number]) for number in (1, 2, 0)]
    for name, got in read_tensors(tmp_path / "merged").items():
        average = tensors[0][name].double()
        for later in tensors[1:]:
            average = 0.75 * average + 0.25 * later[name].double()
        torch.testing.assert_close(got.double(), average, rtol=2e-7, atol=1e-12)
    assert used.values == (0.25, 0.75**2, 0.75 * 0.25) and sum(used.values) == 1
    source = json.loads((tmp_path / "merged/manifest.json").read_text())["source"]
    assert (source["format"], source["weights"]) == ("merge", "ema:0.75")
    assert [parent["step"] for parent in source["parents"]] == [300, 100, 200]
    for parent, directory, weight in zip(source["parents"], order, used.values, strict=True):
        assert (parent["path"], parent["format"], parent["weight"]) == (str(directory), "sharded", weight)
        assert parent["manifest_sha256"] == sha256_file(directory / "manifest.json")
    with refused("both of step 300 and have no order"):
        change_step(order[1], 300)
        merge_checkpoints(order, tmp_path / "again", weights="ema:0.75")
    with refused(f"{models[0]} does not tell its step"):
        merge_checkpoints(models, tmp_path / "again", weights="ema:0.75")


def change_step(checkpoint: Path, step: int) -> None:
    from meditron_train.checkpoint.manifest import write_manifest

    change_json(checkpoint / "meta.json", step=step)
    write_manifest(checkpoint)


def test_parents_without_a_manifest_are_named_with_the_hashes_of_their_files(tmp_path: Path) -> None:
    models = write_models(tmp_path, 2)
    merge_checkpoints(models, tmp_path / "merged")
    parents = json.loads((tmp_path / "merged/manifest.json").read_text())["source"]["parents"]
    for parent, model in zip(parents, models, strict=True):
        assert parent["files"]["model.safetensors"] == sha256_file(model / "model.safetensors")
    assert verify_manifest(tmp_path / "merged") == []


@pytest.mark.parametrize(
    "rule, message",
    [
        ("0.5,0.6", "sum to 1.1 instead of 1; in this proportion they are 5/11,6/11"),
        ("0.5", "1 numbers for 2 checkpoints"),
        ("1,0", "checkpoint 2 has the weight 0"),
        ("-1,2", "'-1' is not a weight"),
        ("1e999999999,0", "is not a weight"),
        ("1/0,1", "is not a weight"),
        ("0.5/1,0.5/1", "'0.5/1' is not a weight"),
        ("²,1", "is not a weight"),
        ("٣,1", "is not a weight"),
        ("nan,1", "is not a weight"),
        ("average", "'average' is not a weight; write uniform, ema:DECAY"),
        ("ema", "write ema:DECAY with a number between 0 and 1"),
        ("ema:1", "write ema:DECAY with a number between 0 and 1"),
    ],
)
def test_weights_that_are_none(rule: str, message: str) -> None:
    with refused(message):
        parse_weights(rule, 2, [1, 2])


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a, b = write_models(tmp_path, 2, vocab_size=VOCAB_SIZE)
    out = tmp_path / "out"
    with refused("an average needs two checkpoints or more"):
        merge_checkpoints([a], out)
    with refused("is given twice"):
        merge_checkpoints([a, b, tmp_path / "model_0/../model_1"], out)
    wide = write_tiny_llama(tmp_path / "wide", vocab_size=VOCAB_SIZE, intermediate_size=96)
    with refused("model_0 and ", "wide have different configurations: intermediate_size 80 against 96"):
        merge_checkpoints([a, wide], out)
    half = write_tiny_llama(tmp_path / "half", vocab_size=VOCAB_SIZE, dtype="bfloat16")
    with refused("float32 in ", "bfloat16 in ", "choose the dtype of the average with --dtype"):
        merge_checkpoints([a, half], out)
    with refused("lies inside"):
        merge_checkpoints([a, b], a / "out")
    write_tokenizer_model(a)
    with refused("have different tokenizers (tokenizer: missing in B)"):
        merge_checkpoints([a, b], out)
    write_tokenizer_model(b, split_digits=False)
    with refused("model_0 and ", "model_1 have different tokenizers"):
        merge_checkpoints([a, b], out)
    assert not out.exists() and not (tmp_path / "out.tmp").exists()


def test_damage_and_nan_are_named_with_the_checkpoint(tmp_path: Path) -> None:
    a, b = write_models(tmp_path, 2)
    tensors = read_tensors(b)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    rewrite_tensors(b, tensors)
    with refused(f"{b}: model.layers.1.mlp.up_proj.weight is not finite (nan in row 7)"):
        merge_checkpoints([a, b], tmp_path / "out")
    merge_checkpoints([a, b], tmp_path / "allowed", limits=Limits(allow_nonfinite=True))
    got = read_tensors(tmp_path / "allowed")["model.layers.1.mlp.up_proj.weight"]
    assert got.isnan().nonzero().tolist() == [[7, 3]]
    write_checkpoint(tmp_path / "unsealed")
    with refused("manifest.json is missing"):
        merge_checkpoints(
            [tmp_path / "unsealed", shutil.copytree(tmp_path / "unsealed", tmp_path / "b")], tmp_path / "c"
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()


def test_finished_files_of_an_interrupted_merge_are_kept(tmp_path: Path, monkeypatch) -> None:
    models, out = write_models(tmp_path, 2), tmp_path / "out"
    record, names, allowed = Workspace.record, [], 2

    def remember(work: Workspace, name: str, written: object) -> None:
        if len(names) >= allowed:
            raise KeyboardInterrupt
        names.append(name)
        record(work, name, written)  # type: ignore[arg-type]

    monkeypatch.setattr(Workspace, "record", remember)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(models, out, max_shard_size="40KB")
    assert not out.exists()
    allowed = 1000
    merge_checkpoints(models, out, max_shard_size="40KB")
    assert len(names) == len(set(names)) == len(list(out.glob("*.safetensors")))
    merge_checkpoints(models, tmp_path / "alone", max_shard_size="40KB")
    assert (out / "manifest.json").read_bytes() == (tmp_path / "alone/manifest.json").read_bytes()


def _merge(rank: int, world_size: int, a: str, b: str, target: str) -> bool:
    with meet(detect_launcher()) as ranks:
        merge_checkpoints([a, b], target, max_shard_size="40KB", ranks=ranks)
    return True


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    a, b = write_models(tmp_path, 2)
    assert run_ranks(_merge, 2, str(a), str(b), str(tmp_path / "shared")) == [True, True]
    merge_checkpoints([a, b], tmp_path / "alone", max_shard_size="40KB")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("shared", "alone")]
    assert manifests[0] == manifests[1]


@pytest.mark.long
def test_memory_stays_below_max_ram(tmp_path: Path) -> None:
    """Two models of 245 MB become a third; what the process adds is a part of one."""
    sizes = {"hidden_size": 960, "intermediate_size": 10_600, "vocab_size": 2000}
    models = [write_tiny_llama(tmp_path / f"model_{seed}", seed=seed, **sizes) for seed in range(2)]
    model_num_bytes = (models[0] / "model.safetensors").stat().st_size
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            limit = resident_num_bytes() + (170 << 20)
            merge_checkpoints(models, tmp_path / "merged", limits=Limits(limit))
            status = Path("/proc/self/status").read_text()
            peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
            os.write(writer, f"{limit} {peak}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        limit, peak = map(int, pipe.read().split())
    os.waitpid(child, 0)
    assert model_num_bytes > 170 << 20
    assert peak <= limit, f"{peak >> 20} MiB of {limit >> 20}"
