"""Model FLOPs per token, peak speeds of accelerators, and MFU.

MFU (model FLOPs utilisation) = tokens/s x model FLOPs per token / (peak FLOP/s x accelerators): the work the
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

from dataclasses import dataclass
from typing import Literal

from meditron_train.config.model_config import ModelConfig

Convention = Literal["parameters", "attention", "causal_attention"]
DEFAULT_CONVENTION: Convention = "parameters"


@dataclass(frozen=True)
class PeakFlops:
    """Dense peak FLOP/s of one accelerator, without structured sparsity."""

    bf16: float
    fp32: float
    """Plain fp32 on the CUDA cores: torch does not use TF32 for matrix products unless it is told to."""


# NVIDIA's data sheets (the tensor-core figures there with a star assume 2:4 sparsity; these are halved):
# A100 80GB SXM (DA-10031), H100 SXM (2023), H200 SXM (2024).
PEAK_FLOPS: dict[str, PeakFlops | None] = {
    "a100-80gb": PeakFlops(bf16=312e12, fp32=19.5e12),
    "h100-80gb": PeakFlops(bf16=989e12, fp32=67e12),
    "h200-141gb": PeakFlops(bf16=989e12, fp32=67e12),
    "cpu": None,  # no honest peak without measuring it: MFU is null
}


def num_matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix multiplications, output layer included (N_matmul above)."""
    layers = model.num_layers * (model.num_layer_parameters - model.num_layer_vector_parameters)
    return layers + model.num_embedding_parameters


def attention_flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """FLOPs of q·k and p·v, forward and backward, for one token of a `seq_len` sequence, averaged over it."""
    flops = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return flops / 2 if causal else float(flops)


def model_flops_per_token(
    model: ModelConfig, seq_len: int, convention: Convention = DEFAULT_CONVENTION
) -> float:
    """FLOPs the model needs to train on one token (forward and backward, nothing recomputed)."""
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    if convention == "parameters":
        return 6.0 * model.num_parameters
    dense = 6.0 * num_matmul_parameters(model)
    return dense + attention_flops_per_token(model, seq_len, causal=convention == "causal_attention")


def mfu(
    model: ModelConfig,
    seq_len: int,
    *,
    tokens_per_second: float,
    num_gpus: int,
    gpu: str | None,
    precision: Literal["bf16", "fp32"] = "bf16",
    convention: Convention = DEFAULT_CONVENTION,
) -> float | None:
    """Model FLOPs utilisation in [0, 1], or None where the peak is unknown (CPU, a GPU not in PEAK_FLOPS).

    `tokens_per_second` is that of the whole job on `num_gpus` accelerators.
    """
    peak = PEAK_FLOPS.get(gpu) if gpu is not None else None
    if peak is None:
        return None
    peak_flops = (peak.bf16 if precision == "bf16" else peak.fp32) * num_gpus
    return tokens_per_second * model_flops_per_token(model, seq_len, convention) / peak_flops


def gpu_type(device_name: str, num_bytes: int | None = None) -> str | None:
    """Key of PEAK_FLOPS for torch.cuda.get_device_name(); None for hardware that is not in the table.

    `num_bytes` of memory, where known, keeps smaller cards of the same name out (A100-40GB).
    The slower PCIe and NVL cards are not in the table either: a wrong peak would give a wrong MFU.
    """
    words = device_name.upper().replace("-", " ").split()
    if "PCIE" in words or "NVL" in words:
        return None
    for chip, name, least_gib in (
        ("H200", "h200-141gb", 130),
        ("H100", "h100-80gb", 75),
        ("A100", "a100-80gb", 75),
    ):
        if chip in words:
            return name if num_bytes is None or num_bytes >= least_gib * 2**30 else None
    return "cpu" if words == ["CPU"] else None
