"""The only door to the compiled core in csrc/, with what it offers to other people's code."""

from meditron_train.native.attention import AttentionSpan, Rotation, packed_attention
from meditron_train.native.fused import rms_norm, softmax_gradient_, softmax_statistics, swiglu
from meditron_train.native.packing import pack_best_fit

__all__ = [
    "AttentionSpan",
    "Rotation",
    "pack_best_fit",
    "packed_attention",
    "rms_norm",
    "softmax_gradient_",
    "softmax_statistics",
    "swiglu",
]
