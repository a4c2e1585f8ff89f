"""Bytes of a checkpoint, to be known before it is written."""

from __future__ import annotations

from meditron_train.config.finetuning import num_adapter_parameters
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config

BYTES_PER_PARAMETER = {"bf16": 2, "fp32": 4}
# The optimizer's fp32 copy of the weights and Adam's two moments.
OPTIMIZER_BYTES_PER_PARAMETER = 12


def checkpoint_bytes(config: Config, model: ModelConfig) -> int:
    """Bytes of a training checkpoint's tensors: what is trained and its optimizer state, without vocabulary padding."""
    trained = model.num_parameters if config.lora is None else num_adapter_parameters(config.lora, model)
    return trained * (BYTES_PER_PARAMETER[config.train.precision] + OPTIMIZER_BYTES_PER_PARAMETER)
