"""Rotary position embedding (Su et al. 2021) as Llama uses it, with the scalings of Llama's relatives.

Legend: T packed tokens of the whole micro-batch, D head size, C = D/2 channel pairs.
"""

from __future__ import annotations

import functools
import math

import torch

from meditron_train.config.model_config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotation speed of each pair of channels, in radians per position: fp32 [D/2].

    `linear` divides every speed by the factor (Chen et al. 2023); `llama3` divides the slow ones and blends
    between (Llama 3.1 model card, reference code); `dynamic` starts unscaled: see `document_frequencies`.
    """
    inv_freq = _base_frequencies(rope.theta, head_dim)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(inv_freq, rope)
    return inv_freq


@functools.cache
def _frequencies_on(device: torch.device, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """`inverse_frequencies` on a device, sent there once: a copy for each micro-batch would make the host wait."""
    return inverse_frequencies(rope, head_dim).to(device)


def _base_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _llama3_frequencies(inv_freq: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    assert rope.original_max_position_embeddings and rope.low_freq_factor and rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    original = rope.original_max_position_embeddings
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / rope.low_freq_factor, inv_freq / rope.factor, blended)
    return torch.where(wavelength < original / rope.high_freq_factor, inv_freq, scaled)


def document_frequencies(model: ModelConfig, document_length: int) -> torch.Tensor:
    """Speeds for one document: fp32 [D/2]. Only `dynamic` (NTK) scaling depends on the length, in tokens."""
    rope = model.rope
    trained = model.max_position_embeddings
    if rope.kind != "dynamic" or document_length <= trained:
        return inverse_frequencies(rope, model.head_dim)
    growth = rope.factor * document_length / trained - (rope.factor - 1)
    theta = rope.theta * growth ** (model.head_dim / (model.head_dim - 2))
    return _base_frequencies(theta, model.head_dim)


def cos_sin(
    model: ModelConfig, positions_T: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables to rotate by: two fp32 tensors [T, D/2], a row for each token, as `meditron_train.native.Rotation` takes
    them.

    Args:
        positions_T: integer positions inside each document, on the model's device.
        cu_seqlens: document boundaries of the *whole* micro-batch [documents+1] on CPU with positions_T whole
            too; needed for `dynamic` scaling only, whose speeds depend on each document's length.
    """
    if model.rope.kind == "dynamic" and cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        if int(lengths.max()) > model.max_position_embeddings:
            tables = torch.stack([document_frequencies(model, int(n)) for n in lengths])
            inv_freq = tables.repeat_interleave(lengths.long(), dim=0).to(positions_T.device)
            angle_TC = positions_T[:, None] * inv_freq
            return angle_TC.cos(), angle_TC.sin()
    inv_freq = _frequencies_on(positions_T.device, model.rope, model.head_dim)
    angle_TC = positions_T[:, None].float() * inv_freq
    return angle_TC.cos(), angle_TC.sin()
