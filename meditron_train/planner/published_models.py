"""Shapes of the models that the presets name, so that a run can be planned where their files are not.

Source: config.json of Llama-2-7b-hf, 13b and 70b (Touvron et al. 2023, arXiv 2307.09288, table 1).
"""

from __future__ import annotations

from pathlib import Path

from meditron_train.config.model_config import ModelConfig

_COMMON = {"vocab_size": 32000, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40, 40),
    "llama-2-70b": (8192, 28672, 80, 64, 8),
}
_KEYS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")


def published_model(directory: Path) -> tuple[str, ModelConfig] | None:
    """(name, shape) of the published model that a directory is named after, None for any other name."""
    name = directory.name.lower()
    for known, sizes in _SHAPES.items():
        if name in (known, f"{known}-hf"):
            return known, ModelConfig(**_COMMON, **dict(zip(_KEYS, sizes, strict=True)))
    return None
