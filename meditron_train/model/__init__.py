"""Llama as a megatron-core model."""

from meditron_train.model.attention import PackedSequence
from meditron_train.model.llama import LlamaModel, build_chunk, transformer_config

__all__ = ["LlamaModel", "PackedSequence", "build_chunk", "transformer_config"]
