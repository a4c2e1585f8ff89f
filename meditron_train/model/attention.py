"""What stands in megatron-core's `core_attention` slot: RoPE and document-masked attention on packed tokens.

Legend: T local packed tokens, N query heads, K key/value heads (both per tensor-parallel rank), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from meditron_train.config.model_config import ModelConfig
from meditron_train.mcore import (
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    is_layer_window_attention,
)
from meditron_train.model.rope import cos_sin, rotate
from meditron_train.native import AttentionSpan, packed_attention


@dataclass
class PackedSequence(PackedSeqParams):
    """What every layer needs to know of a packed micro-batch; megatron-core hands it through unread.

    Attributes:
        cos_TD, sin_TD: fp32 rotation tables of the local tokens.
        spans: which local queries see which (gathered) keys.
        gather_index: int64 [T·cp], puts keys gathered rank after rank back in sequence order; None without
            context parallelism.
    """

    cos_TD: torch.Tensor | None = None
    sin_TD: torch.Tensor | None = None
    spans: tuple[AttentionSpan, ...] = ()
    gather_index: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        *,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        local_index: torch.Tensor | None,
        spans: tuple[AttentionSpan, ...],
        gather_index: torch.Tensor | None,
    ) -> PackedSequence:
        """From a micro-batch: positions and boundaries of the whole of it, and which of its tokens are local."""
        cos_TD, sin_TD = cos_sin(model, positions_T, cu_seqlens)
        if local_index is not None:
            cos_TD, sin_TD = cos_TD[local_index], sin_TD[local_index]
        return cls(qkv_format="thd", cos_TD=cos_TD, sin_TD=sin_TD, spans=spans, gather_index=gather_index)


class PackedAttention(torch.nn.Module):
    """Core attention for packed sequences, with the constructor and call that megatron-core's layer uses."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # in keys, the query's own included

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> torch.Tensor:
        """Rotate, gather keys and values over the context-parallel group, attend.

        Args:
            query: [T, N, D]; key, value: [T, K, D].
            packed_seq_params: the micro-batch's `PackedSequence`; required.

        Returns:
            [T, N·D].
        """
        packed = packed_seq_params
        assert isinstance(packed, PackedSequence) and packed.cos_TD is not None and packed.sin_TD is not None
        query = rotate(query, packed.cos_TD, packed.sin_TD)
        key = rotate(key, packed.cos_TD, packed.sin_TD)
        if packed.gather_index is not None:
            keys_and_values = _GatherSequence.apply(torch.stack((key, value), dim=1), self.context_group)
            keys_and_values = keys_and_values[packed.gather_index]
            key, value = keys_and_values[:, 0], keys_and_values[:, 1]
        if len(packed.spans) == 1:
            return self._attend(query, key, value, packed.spans[0]).flatten(1)
        outputs = [
            self._attend(
                query[span.query_start : span.query_end],
                key[span.key_start : span.key_end],
                value[span.key_start : span.key_end],
                span,
            )
            for span in packed.spans
        ]
        return torch.cat(outputs).flatten(1)

    def _attend(
        self, q_TND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, span: AttentionSpan
    ) -> torch.Tensor:
        return packed_attention(
            q_TND,
            k_SKD,
            v_SKD,
            span.cu_seqlens,
            cu_seqlens_kv=span.cu_seqlens_kv,
            softmax_scale=self.softmax_scale,
            window=self.window,
        )


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension; the backward sums every rank's gradient of our part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        local = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None
