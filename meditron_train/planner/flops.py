"""Model FLOPs per token, peak speeds of accelerators, and MFU.

MFU (model FLOPs utilization) = tokens/s x model FLOPs per token / (peak FLOP/s x accelerators): the work the
model needs, whatever was recomputed, over what the hardware could have done. Published numbers differ by what
they count, so every number here carries its convention:

| convention         | FLOPs per token (forward + backward) | who reports it                            |
|--------------------|--------------------------------------|-------------------------------------------|
| `parameters`       | 6·N                                  | Meditron-70B (42.3 %), Kaplan et al. 2020 |
| `attention`        | 6·N_matmul + 12·L·heads·D·S          | PaLM, appendix B; Megatron; NVIDIA        |
| `causal_attention` | 6·N_matmul + 6·L·heads·D·S           | as above, counting only pairs that exist  |

N: all parameters, unpadded, tied embeddings once. N_matmul: those in matrix multiplications, that is the four
attention projections and three MLP matrices of every layer, and the output layer (also when tied); not the
embedding look-up, not the norms and biases. 6 = a multiply and an add, once forward and twice backward. Attention: q·k
and p·v cost 2·2·S·heads·D per token and layer forward with all S keys, three times that with backward:
12·heads·D·S; under the causal mask a token sees S/2 keys on average.

S is the sequence length. Packed documents do less attention work than a sequence in one piece, and so does a
sliding window; this is not credited: the same speed gives the same MFU however the documents are packed.

Sources: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B; Kaplan et al. 2020 (arXiv 2001.08361), section
2.1; Chen et al. 2023 (arXiv 2311.16079) for Meditron.
"""

from __future__ import annotations

import re
from typing import Literal

from meditron_train.config.finetuning import LoraSection, num_adapter_parameters
from meditron_train.config.model_config import ModelConfig
from meditron_train.planner.hardware import HARDWARE

Convention = Literal["parameters", "attention", "causal_attention"]
DEFAULT_CONVENTION: Convention = "parameters"


def num_matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix multiplications, output layer included (N_matmul above)."""
    layers = model.num_layers * (model.num_layer_parameters - model.num_layer_vector_parameters)
    return layers + model.num_embedding_parameters


def attention_flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """FLOPs of q·k and p·v, forward and backward, for one token of a `seq_len` sequence, averaged over it."""
    flops = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return flops / 2 if causal else float(flops)


def model_flops_per_token(
    model: ModelConfig,
    seq_len: int,
    convention: Convention = DEFAULT_CONVENTION,
    lora: LoraSection | None = None,
) -> float:
    """FLOPs the model needs to train on one token (forward and backward, nothing recomputed).

    With adapters (`lora`) the model's own matrices have no gradient to be computed: 4 instead of 6 for each parameter
    of theirs, 6 for each of the adapters.

    Raises:
        ValueError: seq_len is below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    if convention == "parameters":
        dense = float(model.num_parameters)
    else:
        dense = float(num_matmul_parameters(model))
    dense = 6 * dense if lora is None else 4 * dense + 6 * num_adapter_parameters(lora, model)
    if convention == "parameters":
        return dense
    return dense + attention_flops_per_token(model, seq_len, causal=convention == "causal_attention")


def mfu(
    model: ModelConfig,
    seq_len: int,
    *,
    tokens_per_second: float,
    num_gpus: int,
    gpu: str | None,
    precision: Literal["bf16", "fp32"] = "bf16",
    lora: LoraSection | None = None,
) -> float | None:
    """Model FLOPs utilization in [0, 1], or None where the peak is unknown (a CPU, a GPU not in HARDWARE).

    `tokens_per_second` is that of the whole job on `num_gpus` accelerators.
    """
    if gpu == "cpu" or gpu not in HARDWARE:  # no honest peak of a CPU without measuring it
        return None
    peak_flops = HARDWARE[gpu].flops(precision) * num_gpus
    return tokens_per_second * model_flops_per_token(model, seq_len, lora=lora) / peak_flops


def gpu_type(device_name: str) -> str | None:
    """Key of HARDWARE for torch.cuda.get_device_name(); None for hardware that is not in the table.

    The slower PCIe and NVL cards, parts of a card (MIG) and cards of another memory are not in the table either: a
    wrong peak would give a wrong MFU.
    """
    words = device_name.upper().replace("-", " ").split()
    if words == ["CPU"]:
        return "cpu"
    if {"PCIE", "NVL", "MIG"} & set(words):
        return None
    stated = [word for word in words if re.fullmatch(r"\d+GB", word)]
    for chip, usual in (("H200", "141GB"), ("H100", "80GB"), ("A100", "80GB")):
        if chip in words:
            name = f"{chip}-{stated[0] if stated else usual}".lower()
            return name if name in HARDWARE else None
    return None
