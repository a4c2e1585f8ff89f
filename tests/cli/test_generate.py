"""`generate` as a command."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.cli.main import app
from meditron_train.errors import UserError
from tests.evaluate.models import write_tiny_model

PROMPT = "kamori ten zupa"


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("generate") / "model")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_both_formats_say_the_same(hf_directory, tmp_path):
    hf_to_sharded(hf_directory, tmp_path / "sharded")
    options = ("--prompt", PROMPT, "--max-new-tokens", 8, "--device", "cpu")
    text = run(hf_directory, *options)
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 1
    assert run(tmp_path / "sharded", *options) == text


def test_sampling(hf_directory):
    options = (
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        16,
        "--temperature",
        1.0,
        "--top-p",
        0.9,
        "--device",
        "cpu",
    )
    assert run(hf_directory, *options, "--seed", 1) == run(hf_directory, *options, "--seed", 1)
    assert run(hf_directory, *options, "--seed", 1) != run(hf_directory, *options, "--seed", 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--temperature", "-1"), "temperature is -1"),
        (("--top-p", "2"), "top_p is 2"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--temperature", "inf"), "temperature is inf"),
        (("--temperature", "1e-30"), "temperature is 1e-30"),
        (("--top-p", "0"), "top_p is 0"),
        (("--top-p", "nan"), "top_p is nan"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", str(2**64)), f"seed is {2**64}"),
    ],
)
def test_values_out_of_range(hf_directory, arguments, said, capsys):
    result = CliRunner().invoke(app, ["generate", str(hf_directory), "--prompt", PROMPT, *arguments])
    assert result.exit_code == UserError.exit_code
    assert said in result.stderr


def test_a_directory_that_is_no_model(tmp_path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt", PROMPT])
    assert result.exit_code == UserError.exit_code
    assert str(tmp_path) in result.stderr and "config.json" in result.stderr


def test_an_unknown_device(hf_directory):
    result = CliRunner().invoke(app, ["generate", str(hf_directory), "--prompt", PROMPT, "--device", "tpu"])
    assert result.exit_code == 2 and "tpu" in result.output


def test_cuda_where_there_is_none(hf_directory, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["generate", str(hf_directory), "--prompt", PROMPT, "--device", "cuda"])
    assert result.exit_code == UserError.exit_code
    assert "no CUDA device" in result.stderr and "--device cpu" in result.stderr


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_outermost_seeds_and_temperatures(hf_directory, seed):
    for temperature in (1e-6, 1e300):
        options = ("--max-new-tokens", 2, "--device", "cpu", "--seed", seed, "--temperature", temperature)
        assert run(hf_directory, "--prompt", PROMPT, *options).startswith(PROMPT)


def test_a_damaged_checkpoint(hf_directory, tmp_path):
    hf_to_sharded(hf_directory, tmp_path / "sharded")
    raw = bytearray((tmp_path / "sharded" / "__0_0.distcp").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "sharded" / "__0_0.distcp").write_bytes(raw)
    result = CliRunner().invoke(
        app, ["generate", str(tmp_path / "sharded"), "--prompt", PROMPT, "--device", "cpu"]
    )
    assert result.exit_code == UserError.exit_code
    assert "has changed since the checkpoint was written" in result.stderr and result.stdout == ""
