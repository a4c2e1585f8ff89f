"""How long a training step takes: compute, communication and the pipeline's bubble, from a table of hardware.

One micro-batch on one pipeline stage, forward and backward (t: tensor, c: context, d: data, P: pipeline, v: chunks per
stage, m: micro-batches per step, h: hidden, f: intermediate, e: bytes of the precision, s: 1/t under sequence
parallelism, else 1; B: tokens of the rank's micro-batch):

| part        | seconds                                                                                      |
|-------------|----------------------------------------------------------------------------------------------|
| matrices    | 6 FLOPs per parameter and token (8 when recomputed in full) / (peak x efficiency x n/(n+128)), |
|             | n: the smallest side of the rank's matrices                                                  |
| attention   | 6·N·D·L̄ /t per token and layer forward and backward, causal; L̄: twice the keys that a token  |
|             | sees on average: the length S of its document, and in a layer with a window of W < S keys    |
|             | 2·(W²/2 + W·(S-W))/S; 7/6 of it, as flash attention computes scores again                    |
| elementwise | bytes read and written by norms, residuals, rotation and SwiGLU, and on the last stage by the  |
|             | loss (3·e·V/t per token) / (HBM bandwidth x efficiency)                                      |
| tensor      | 4 all-reduces of e·h·B per layer (or as many pairs of all-gather and reduce-scatter),          |
|             | 2·(t-1)/t of the bytes each, and twice the latency of a collective                           |
| context     | keys and values of all ranks, gathered forward, and once more where attention is computed    |
|             | again, and their gradients, scattered: 2·e·K·D/t·B·(c-1) each                                |

A step: m times the slowest stage (where the layers do not divide, some stages have more of them), plus the bubble
(P-1)/v times the mean stage (Narayanan et al. 2021, arXiv 2104.04473), plus the sends between stages, plus gradients (4
bytes per parameter, reduce-scattered over d·c) and weights (e bytes, all-gathered), less what overlaps with one
micro-batch's backward or forward pass, plus the update (reading and writing 12 bytes of state, gradients and weights
per parameter of the shard). Without the distributed optimizer gradients are all-reduced, twice the bytes, and no
weights are sent.

A collective over n members begins n latencies late: a ring of n-1 hops, and its launch. Those of gradients and weights
are few and large: their latency is left out.

A group that stays within a node uses NVLink; one that leaves it shares the node's network with the other groups that
leave it through the same node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.layout import ParallelLayout
from meditron_train.planner.checkpoint_size import BYTES_PER_PARAMETER
from meditron_train.planner.flops import model_flops_per_token
from meditron_train.planner.hardware import Hardware
from meditron_train.planner.memory import stage_parameters

# A matrix product with a side as short as one tile of the tensor cores runs at half speed.
_HALF_SPEED_SIDE = 128
_ATTENTION_RECOMPUTED = 7 / 6  # the backward pass computes q·k again: 2.5 times the forward pass instead of 2
_LOSS_ACCESSES = 3  # logits read forward and backward, their gradient written
_STATE_BYTES = 2 * 12 + 4  # of the update per parameter: state read and written, gradient read


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step by part. `compute` includes recomputation."""

    matrices: float
    attention: float
    elementwise: float
    tensor_communication: float
    context_communication: float
    bubble: float
    pipeline_communication: float
    data_communication: float
    update: float
    num_tokens: int
    num_gpus: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        names = (
            "matrices",
            "attention",
            "elementwise",
            "tensor_communication",
            "context_communication",
            "bubble",
            "pipeline_communication",
            "data_communication",
            "update",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.num_tokens / self.total


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch on one stage, forward and backward."""

    matrices: float
    attention: float
    elementwise: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.elementwise + self.tensor + self.context


def predict_step(
    config: Config,
    model: ModelConfig,
    layout: ParallelLayout,
    hardware: Hardware,
    *,
    mean_document_tokens: float | None = None,
    batch_size: int | None = None,
) -> StepTime:
    """The time of one step of the config under `layout`, which must be sound.

    Args:
        config, model, layout, hardware: what runs where.
        mean_document_tokens: length of the document that a token is in, on average: of lengths l, the sum of l² over
            that of l, as attention costs l² for each document; None: one document fills the sequence.
        batch_size: samples of the step; None: train.global_batch_size, as after the batch ramp.
    """
    train = config.train
    batch_size = batch_size or train.global_batch_size
    num_microbatches = batch_size // (train.micro_batch_size * layout.data)
    seen = min(mean_document_tokens or train.seq_len, train.seq_len)
    kinds = [_kind(model, layout, stage) for stage in range(layout.pipeline)]
    times = {kind: _stage_time(config, model, layout, hardware, kind, seen) for kind in set(kinds)}
    stages = [times[kind] for kind in kinds]
    slowest = max(stages, key=lambda stage: stage.total)
    mean = sum(stage.total for stage in stages) / len(stages)
    bubble = (layout.pipeline - 1) / layout.virtual_pipeline * mean
    sends = _send_time(config, model, layout, hardware)
    return StepTime(
        matrices=num_microbatches * slowest.matrices,
        attention=num_microbatches * slowest.attention,
        elementwise=num_microbatches * slowest.elementwise,
        tensor_communication=num_microbatches * slowest.tensor,
        context_communication=num_microbatches * slowest.context,
        bubble=bubble,
        pipeline_communication=num_microbatches * layout.virtual_pipeline * sends,
        data_communication=_data_time(config, model, layout, hardware, slowest),
        update=_update_time(config, model, layout, hardware),
        num_tokens=batch_size * train.seq_len,
        num_gpus=layout.world_size,
    )


def predicted_mfu(
    step: StepTime,
    model: ModelConfig,
    seq_len: int,
    hardware: Hardware,
    precision: str,
    lora: LoraSection | None = None,
) -> dict[str, float]:
    """MFU by each convention of `planner.flops`, as a run with these adapters counts it."""
    peak = hardware.flops(precision) * step.num_gpus
    return {
        convention: step.tokens_per_second * model_flops_per_token(model, seq_len, convention, lora) / peak
        for convention in ("parameters", "causal_attention", "attention")
    }


def link_bytes_per_second(hardware: Hardware, group_size: int, stride: int) -> float:
    """What each member of a group sends and receives per second; the members' ranks are `stride` apart.

    Through the network, the groups that pass through a node share it: as many as members of it are in different
    groups.
    """
    if group_size * stride <= hardware.gpus_per_node:
        return hardware.nvlink_bytes_per_second * hardware.link_efficiency
    members_in_node = max(1, hardware.gpus_per_node // stride)
    share = hardware.network_bytes_per_second * members_in_node / hardware.gpus_per_node
    return min(share, hardware.nvlink_bytes_per_second) * hardware.link_efficiency


class _Kind(NamedTuple):
    """What tells the stages of a pipeline apart: their layers, those of them with a window, and who has the loss."""

    num_layers: int
    num_windowed: int
    is_last: bool


def _kind(model: ModelConfig, layout: ParallelLayout, stage: int) -> _Kind:
    layers = layout.layers_on(stage, model.num_layers)
    return _Kind(len(layers), sum(map(model.has_window, layers)), stage == layout.pipeline - 1)


def _stage_time(
    config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware, kind: _Kind, seen: float
) -> _Stage:
    train, tensor, num_layers = config.train, layout.tensor, kind.num_layers
    element, peak = BYTES_PER_PARAMETER[train.precision], hardware.flops(train.precision)
    tokens = train.seq_len * train.micro_batch_size / layout.context
    vocabulary = model.padded_vocab_size(tensor, config.parallel.vocab_multiple) / tensor
    # Forward, two backward products, and forward again.
    passes = {"none": 3, "selective": 3, "full": 4}[train.recompute]

    layer_parameters = (model.num_layer_parameters - model.num_layer_vector_parameters) / tensor
    parameters = num_layers * layer_parameters
    if kind.is_last:
        parameters += 3 / passes * vocabulary * model.hidden_size
    side = min(
        model.hidden_size, model.intermediate_size / tensor, model.num_heads * model.head_dim / tensor, tokens
    )
    efficiency = hardware.matmul_efficiency * side / (side + _HALF_SPEED_SIDE)
    matrices = 2 * passes * parameters * tokens / (peak * efficiency)

    width = model.num_heads * model.head_dim / tensor
    recomputed = 3 + (train.recompute != "none")
    all_seen = (num_layers - kind.num_windowed) * seen + kind.num_windowed * _seen_in_window(model, seen)
    attention_flops = 2 * recomputed * width * all_seen * tokens * _ATTENTION_RECOMPUTED
    attention = attention_flops / (peak * hardware.attention_efficiency)

    share = 1 / tensor if layout.sequence else 1.0
    between = (2 * 2 + 2 * 3) * model.hidden_size * share  # norms and residuals: read and written
    inside = (
        2 * (model.num_heads + model.num_kv_heads) * model.head_dim / tensor
        + 3 * model.intermediate_size / tensor
    )
    moved = passes * element * (between + inside) * tokens * num_layers
    if kind.is_last:
        moved += _LOSS_ACCESSES * element * vocabulary * tokens
    elementwise = moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)
    return _Stage(
        matrices,
        attention,
        elementwise,
        num_layers * _tensor_time(config, model, layout, hardware, tokens),
        num_layers * _context_time(config, model, layout, hardware, tokens),
    )


def _seen_in_window(model: ModelConfig, seen: float) -> float:
    """Twice the keys that a token sees on average in a layer with a window, in documents of `seen` tokens."""
    window = min(model.sliding_window or seen, seen)
    return 2 * (window**2 / 2 + window * (seen - window)) / seen


def _tensor_time(
    config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware, tokens: float
) -> float:
    """Of one layer."""
    tensor = layout.tensor
    if tensor == 1:
        return 0.0
    all_reduces = 4 + 2 * (config.train.recompute == "full")
    element = BYTES_PER_PARAMETER[config.train.precision]
    num_bytes = all_reduces * 2 * (tensor - 1) / tensor * element * model.hidden_size * tokens
    late = all_reduces * 2 * tensor * hardware.latency_s
    return num_bytes / link_bytes_per_second(hardware, tensor, 1) + late


def _context_time(
    config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware, tokens: float
) -> float:
    """Of one layer."""
    if layout.context == 1:
        return 0.0
    element, collectives = BYTES_PER_PARAMETER[config.train.precision], 2 + (config.train.recompute != "none")
    kv_bytes = 2 * element * model.num_kv_heads * model.head_dim / layout.tensor * tokens
    each = kv_bytes * (layout.context - 1) / link_bytes_per_second(hardware, layout.context, layout.tensor)
    return collectives * (each + layout.context * hardware.latency_s)


def _send_time(config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware) -> float:
    """Of one micro-batch between two stages, forward and backward."""
    if layout.pipeline == 1:
        return 0.0
    tokens = config.train.seq_len * config.train.micro_batch_size / layout.context
    share = 1 / layout.tensor if layout.sequence else 1.0
    num_bytes = 2 * BYTES_PER_PARAMETER[config.train.precision] * model.hidden_size * share * tokens
    speed = link_bytes_per_second(hardware, 2, layout.world_size // layout.pipeline)
    return num_bytes / speed + 2 * hardware.latency_s


def _data_time(
    config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware, slowest: _Stage
) -> float:
    shards = layout.data * layout.context
    if shards == 1:
        return 0.0
    parallel, element = config.parallel, BYTES_PER_PARAMETER[config.train.precision]
    parameters = max(
        stage_parameters(model, layout, stage, parallel.vocab_multiple) for stage in range(layout.pipeline)
    )
    speed = link_bytes_per_second(hardware, shards, layout.tensor)
    gradients = 4 * parameters * (shards - 1) / shards / speed
    weights = element * parameters * (shards - 1) / shards / speed
    if not parallel.distributed_optimizer:  # all-reduced: scattered and gathered, and the weights are there
        gradients, weights = 2 * gradients, 0.0
    # What overlaps does so with one micro-batch: the last backward pass, the first forward pass.
    hidden_gradients = min(gradients, 2 / 3 * slowest.total) if parallel.overlap_grad_reduce else 0.0
    hidden_weights = min(weights, 1 / 3 * slowest.total) if parallel.overlap_param_gather else 0.0
    return gradients + weights - hidden_gradients - hidden_weights


def _update_time(config: Config, model: ModelConfig, layout: ParallelLayout, hardware: Hardware) -> float:
    parameters = max(
        stage_parameters(model, layout, stage, config.parallel.vocab_multiple)
        for stage in range(layout.pipeline)
    )
    shards = layout.data * layout.context if config.parallel.distributed_optimizer else 1
    num_bytes = (_STATE_BYTES + BYTES_PER_PARAMETER[config.train.precision]) * parameters / shards
    return num_bytes / (hardware.memory_bytes_per_second * hardware.memory_efficiency)
