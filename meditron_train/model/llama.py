"""Llama and its relatives as a megatron-core GPTModel: RMSNorm, SwiGLU, grouped-query attention, RoPE inside our
attention.

Legend: B batch (always 1: the micro-batch is packed), L packed tokens of this context-parallel rank, V padded
vocabulary rows per tensor-parallel rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.layout import ParallelLayout, split_dim
from meditron_train.mcore import (
    GPTModel,
    ModuleSpec,
    ProcessGroupCollection,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    set_tensor_model_parallel_attributes,
)
from meditron_train.model.attention import PackedAttention
from meditron_train.model.cross_entropy import VocabParallelCrossEntropy
from meditron_train.model.lora import adapt_layer, is_adapter
from meditron_train.model.mlp import SwigluMLP
from meditron_train.model.norm import RMSNorm

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # Attention is cheap to compute again, and with PyTorch's kernels the largest activation (Korthikanti et al. 2022,
    # section 5).
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    model: ModelConfig,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    recompute: str = "none",
    on_gpu: bool = False,
) -> TransformerConfig:
    """megatron-core's description of the model under a layout.

    Args:
        dtype: of the parameters and activations, torch.float32 or torch.bfloat16.
        recompute: none, selective (attention) or full (every layer).
        on_gpu: NCCL and CUDA streams are there; point-to-point calls then are batched and outputs freed early.
    """
    bf16 = dtype == torch.bfloat16
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.has_qkv_bias,
        **_window(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_uneven_stages(model, layout),
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        perform_initialization=False,  # weights always come from a source: a checkpoint, or seeded by name
        use_cpu_initialization=not on_gpu,
        # The loss is a token sum; gradients are divided once by the global token count, so that every layout
        # computes the same number on masked data.
        calculate_per_token_loss=True,
        # In an interleaved pipeline of two stages both neighbors are the same rank: batched calls, matched by their
        # order, would swap an activation with a gradient of the same shape, silently.
        batch_p2p_comm=on_gpu and layout.virtual_pipeline == 1,
        # Waiting for each call is enough: torch's batched calls keep their tensors until then. The host need not wait
        # for the whole device besides, as megatron-core does for the sake of older versions of torch.
        batch_p2p_sync=False,
        # gloo may still be sending an output when it would be freed.
        deallocate_pipeline_outputs=on_gpu,
        gradient_accumulation_fusion=False,
        **RECOMPUTE[recompute],
    )


def _uneven_stages(model: ModelConfig, layout: ParallelLayout) -> list[list[str]] | None:
    """megatron-core's words for what each stage holds, where the layers do not divide; None where they do."""
    if model.num_layers % layout.pipeline == 0:
        return None
    stages = [["decoder"] * count for count in layout.layer_counts(model.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _window(model: ModelConfig) -> dict[str, Any]:
    """megatron-core's words for a sliding window: how many keys to look back and ahead, and in which layers (1)."""
    if model.sliding_window is None:
        return {}
    layers = [int(model.has_window(layer)) for layer in range(model.num_layers)]
    return {"window_size": (model.sliding_window - 1, 0), "window_attn_skip_freq": layers}


class LlamaModel(GPTModel):
    """One pipeline stage's chunk of Llama.

    Called as `model(tokens, None, None, labels=labels, packed_seq_params=packed)` with tokens and labels [1,
    L] int64 and a `PackedSequence`. The result is fp32 per-token losses [1, L] on the last stage, logits [1,
    L, V] there (padding included) when labels is None, hidden states [L, 1, H] elsewhere.
    """

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per token over the real vocabulary, fp32 [1, L]; vocabulary padding takes no probability.

        Args:
            labels: [1, L]; logits: [L, 1, V], overwritten by the backward.
        """
        group, width = self.pg_collection.tp, logits.shape[-1]
        num_real = min(max(self.true_vocab_size - group.rank() * width, 0), width)
        return VocabParallelCrossEntropy.apply(logits.squeeze(1), labels[0], num_real, group)[None]


def build_chunk(
    config: TransformerConfig,
    model: ModelConfig,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    pipeline_rank: int,
    virtual_rank: int,
    padded_vocab_size: int,
    attention_backend: str = "auto",
    lora: LoraSection | None = None,
) -> LlamaModel:
    """Build this rank's chunk number `virtual_rank`, its parameters uninitialized, on CPU or the current GPU.

    Args:
        config: megatron-core's settings.
        model: the whole model.
        layout: sizes of the parallel dimensions.
        groups: process groups of this rank.
        pipeline_rank, virtual_rank: which layers.
        padded_vocab_size: rows of the whole embedding.
        attention_backend: see `meditron_train.native.packed_attention`.
        lora: the adapters that it gets, which alone require gradients then.
    """
    last_chunk = layout.virtual_pipeline - 1
    num_layers = len(layout.layers_of(pipeline_rank, virtual_rank, model.num_layers))
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        PackedAttention, params={"backend": attention_backend}
    )
    mlp = layer.submodules.mlp
    # megatron-core hands the tensor-parallel group only to its own class.
    layer.submodules.mlp = ModuleSpec(SwigluMLP, params={"tp_group": groups.tp}, submodules=mlp.submodules)
    layer.submodules.sharded_state_dict_keys_map = {}  # norms keep their own names instead of Transformer Engine's
    if lora is not None:
        adapt_layer(layer, lora, model, layout.tensor)
    chunk = LlamaModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
        padded_vocab_size,
        model.max_position_embeddings,
        pre_process=pipeline_rank == 0 and virtual_rank == 0,
        post_process=pipeline_rank == layout.pipeline - 1 and virtual_rank == last_chunk,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",  # RoPE is applied in our attention, with each document's own positions
        pg_collection=groups,
        vp_stage=virtual_rank if layout.virtual_pipeline > 1 else None,
        true_vocab_size=model.vocab_size,
    )
    _mark_split_parameters(chunk)
    if lora is not None:
        _freeze_base(chunk, config)
    return chunk


def global_names(chunk: LlamaModel, first_layer: int) -> dict[str, str]:
    """Local parameter name → name in the whole model, for a chunk whose layers begin with number `first_layer`: only
    layer numbers differ."""
    names = {}
    for local, _ in chunk.named_parameters():
        head, layers, rest = local.partition("decoder.layers.")
        if layers:
            number, _, rest = rest.partition(".")
            names[local] = f"{head}{layers}{first_layer + int(number)}.{rest}"
        else:
            names[local] = local
    return names


def _freeze_base(chunk: LlamaModel, config: TransformerConfig) -> None:
    """Leave gradients to the adapters."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    if chunk.pre_process and config.recompute_granularity == "full":
        # What is computed again has no gradient at all unless one of its inputs wants one.
        chunk.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def _mark_split_parameters(chunk: LlamaModel) -> None:
    """Tell megatron-core which matrices tensor parallelism splits: all but a half of each adapter.

    It marks them itself only when it initializes them, and takes an unmarked one for a replica whose gradient
    counts once in the global norm.
    """
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 2 and (dim := split_dim(name)) is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
