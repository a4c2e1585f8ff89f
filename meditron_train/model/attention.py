"""What stands in megatron-core's `core_attention` slot: RoPE and document-masked attention on packed tokens.

Legend: T packed tokens of the whole micro-batch, L tokens of this context-parallel rank (T/cp), N query heads, K
key/value heads (both per tensor-parallel rank), D head size, C = D/2 channel pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
from meditron_train.model.lora import DropoutPlace
from meditron_train.model.rope import cos_sin
from meditron_train.native import AttentionSpan, Rotation, packed_attention


@dataclass
class KeyValueCache:
    """Keys and values of tokens that earlier passes read, not turned yet: [S, K, D] each, by their layer."""

    layers: dict[PackedAttention, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def extended(
        self, layer: PackedAttention, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All so far, with these [L, K, D] as the last."""
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key, value = torch.cat((old_key, key)), torch.cat((old_value, value))
        self.layers[layer] = key, value
        return key, value


@dataclass
class PackedSequence(PackedSeqParams):
    """What every layer needs to know of a packed micro-batch; megatron-core hands it through unread.

    Attributes:
        spans: which local queries see which keys of the whole micro-batch.
        rotations: how queries and keys of each span turn.
        gather_index: int64 [T], puts keys gathered rank after rank back in sequence order; None without
            context parallelism.
        cache: of earlier passes, before whose keys and values those of this one come; None without it.
        key_index: int64 [S], which tokens (of the cache, then of this pass) the keys of the spans are, where some
            count more than once; None: each token, once.
        dropout: what the adapters' dropout has to know; None without it.
    """

    spans: tuple[AttentionSpan, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    gather_index: torch.Tensor | None = None
    cache: KeyValueCache | None = None
    key_index: torch.Tensor | None = None
    dropout: DropoutPlace | None = None

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
        dropout_seed: int | None = None,
    ) -> PackedSequence:
        """From a micro-batch: positions and boundaries of the whole of it, and which of its tokens are local."""
        cos_TC, sin_TC = cos_sin(model, positions_T, cu_seqlens)
        rotations = tuple(_rotation_of(span, cos_TC, sin_TC, local_index) for span in spans)
        dropout = None
        if dropout_seed is not None:
            dropout = DropoutPlace(dropout_seed, positions_T.numel(), local_index)
        return cls(
            qkv_format="thd", spans=spans, rotations=rotations, gather_index=gather_index, dropout=dropout
        )


def _rotation_of(
    span: AttentionSpan, cos_TC: torch.Tensor, sin_TC: torch.Tensor, local_index: torch.Tensor | None
) -> Rotation:
    """The tables' rows for the span's keys, and which of them its queries take."""
    keys = slice(span.key_start, span.key_end)
    if local_index is None:
        return Rotation(cos_TC[keys], sin_TC[keys])
    queries = local_index[span.query_start : span.query_end] - span.key_start
    return Rotation(cos_TC[keys], sin_TC[keys], q_positions_T=queries)


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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.backend = backend
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
        """Gather keys and values over the context-parallel group, rotate and attend.

        Args:
            query: [L, N, D]; key, value: [L, K, D].
            packed_seq_params: the micro-batch's `PackedSequence`; required.

        Returns:
            [L, N·D].
        """
        packed = packed_seq_params
        assert isinstance(packed, PackedSequence)
        if packed.gather_index is not None:
            keys_and_values = _GatherSequence.apply(torch.stack((key, value), dim=1), self.context_group)
            keys_and_values = keys_and_values[packed.gather_index]
            key, value = keys_and_values[:, 0], keys_and_values[:, 1]
        if packed.cache is not None:
            key, value = packed.cache.extended(self, key, value)
        if packed.key_index is not None:
            key, value = key[packed.key_index], value[packed.key_index]
        outputs = [
            packed_attention(
                query[span.query_start : span.query_end],
                key[span.key_start : span.key_end],
                value[span.key_start : span.key_end],
                span.cu_seqlens,
                cu_seqlens_kv=span.cu_seqlens_kv,
                softmax_scale=self.softmax_scale,
                window=self.window,
                rotation=rotation,
                backend=self.backend,
            )
            for span, rotation in zip(packed.spans, packed.rotations, strict=True)
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


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
