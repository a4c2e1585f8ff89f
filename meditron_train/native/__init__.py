"""The only door to the compiled core in csrc/, with what it offers to other people's code."""

from meditron_train.native.attention import AttentionSpan, packed_attention

__all__ = ["AttentionSpan", "packed_attention"]
