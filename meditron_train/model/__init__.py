"""Llama as a megatron-core model.

Legend of this room, of `parallel/` and of `data/`: T packed tokens of the whole micro-batch, L tokens of this
context-parallel rank (T/cp). `native/` knows no ranks: its T is whatever it is given.
"""

from meditron_train.model.answers import Answers, LogLikelihood, ModelOnRanks, merged
from meditron_train.model.attention import PackedSequence
from meditron_train.model.decoding import Decoding
from meditron_train.model.llama import LlamaModel, build_chunk, global_names, transformer_config

__all__ = [
    "Answers",
    "Decoding",
    "LlamaModel",
    "LogLikelihood",
    "ModelOnRanks",
    "PackedSequence",
    "build_chunk",
    "global_names",
    "merged",
    "transformer_config",
]
