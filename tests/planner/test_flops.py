from __future__ import annotations

from typing import get_args

import pytest

from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.training import GpuName
from meditron_train.planner.flops import (
    gpu_type,
    mfu,
    model_flops_per_token,
    num_matmul_parameters,
)
from meditron_train.planner.hardware import HARDWARE

LLAMA2_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
LLAMA2_70B = LLAMA2_7B.model_copy(
    update={
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
    }
)


def test_parameters_of_the_published_models():
    assert LLAMA2_7B.num_parameters == 6_738_415_616
    assert LLAMA2_70B.num_parameters == 68_976_648_192


def test_7b_by_hand():
    # A layer: 4 projections of 4096², 3 matrices of 4096 x 11008; the output layer is 32000 x 4096.
    per_layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert num_matmul_parameters(LLAMA2_7B) == 32 * per_layer + 32000 * 4096 == 6_607_077_376
    assert model_flops_per_token(LLAMA2_7B, 2048) == 6 * 6_738_415_616
    # Per layer and token, forward: q·k over 2048 keys of width 4096 is 2·2048·4096, and p·v as much.
    # The backward pass costs twice the forward pass.
    attention = 32 * 3 * 2 * (2 * 2048 * 4096)
    assert model_flops_per_token(LLAMA2_7B, 2048, "attention") == 6 * 6_607_077_376 + attention
    assert model_flops_per_token(LLAMA2_7B, 2048, "causal_attention") == 6 * 6_607_077_376 + attention / 2


def test_a_tied_output_layer_still_multiplies():
    tied = LLAMA2_7B.model_copy(update={"tie_embeddings": True})
    assert num_matmul_parameters(tied) == num_matmul_parameters(LLAMA2_7B)
    assert tied.num_parameters == LLAMA2_7B.num_parameters - 32000 * 4096


def test_the_published_mfu_of_meditron_70b():
    # 40,200 tokens/s on 128 A100 are 42.3 % with N = 70e9, as published, and 41.7 % with the exact N.
    published = 40_200 * 6 * 70e9 / (128 * 312e12)
    assert published == pytest.approx(0.423, abs=5e-4)
    exact = mfu(LLAMA2_70B, 4096, tokens_per_second=40_200, num_gpus=128, gpu="a100-80gb")
    assert exact == pytest.approx(0.423 * 68.976648192 / 70, abs=5e-4)


def test_7b_throughput_at_full_utilization():
    # H100, sequences of 4096, causal attention not halved: about 21,460 tokens/s per GPU would be 100 %.
    full = 989e12 / model_flops_per_token(LLAMA2_7B, 4096, "attention")
    assert full == pytest.approx(21_460, rel=0.01)


def test_precision_and_number_of_gpus():
    bf16 = mfu(LLAMA2_7B, 2048, tokens_per_second=1000, num_gpus=1, gpu="a100-80gb")
    fp32 = mfu(LLAMA2_7B, 2048, tokens_per_second=1000, num_gpus=1, gpu="a100-80gb", precision="fp32")
    eight = mfu(LLAMA2_7B, 2048, tokens_per_second=1000, num_gpus=8, gpu="a100-80gb")
    assert fp32 / bf16 == pytest.approx(312 / 19.5)
    assert bf16 / eight == pytest.approx(8)


@pytest.mark.parametrize("gpu", ["cpu", None, "unknown"])
def test_mfu_is_unknown_without_a_peak(gpu):
    assert mfu(LLAMA2_7B, 2048, tokens_per_second=1000, num_gpus=1, gpu=gpu) is None


def test_every_gpu_of_the_configuration_has_a_line():
    assert set(get_args(GpuName)) == set(HARDWARE)


def test_adapters_spare_the_gradients_of_the_frozen_weights():
    lora = LoraSection(rank=8, targets=("q_proj", "down_proj"))
    adapters = 32 * 8 * (4096 + 4096 + 11008 + 4096)
    assert model_flops_per_token(LLAMA2_7B, 2048, lora=lora) == 4 * 6_738_415_616 + 6 * adapters


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "h200-141gb"),
        ("cpu", "cpu"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpu_type(device_name, expected):
    assert gpu_type(device_name) == expected


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="seq_len is 0"):
        model_flops_per_token(LLAMA2_7B, 0)
