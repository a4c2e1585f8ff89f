"""Bytes of memory a training step needs on the fullest GPU, known before a node is taken.

With adapters (`lora`), gradients and optimizer state are those of the adapters alone.

What is counted, for one pipeline stage and one tensor-parallel rank (t: tensor, d: data x context, e: bytes of the
training precision, h: hidden, f: intermediate, N and K: heads and key/value heads, D: head size, V: padded
vocabulary):

| part        | bytes                                                                                       |
|-------------|---------------------------------------------------------------------------------------------|
| weights     | e per parameter                                                                             |
| gradients   | 4 per parameter: they are added up in fp32                                                  |
| optimizer   | 12 per parameter in bf16 (fp32 copy, two moments), 8 in fp32; with the distributed optimizer |
|             | over d                                                                                      |
| activations | below, times the micro-batches that the pipeline schedule keeps alive                       |
| logits      | e·V/t per token of one micro-batch, last stage; their gradient takes their place; on a GPU  |
|             | two fp32 blocks of them besides, of 64 MiB at most                                          |
| allowance   | 3 GiB (CUDA context, NCCL's buffers, workspaces) and 5 % (fragmentation): no formula        |

Activations of a layer per token of the rank's micro-batch, after Korthikanti et al. 2022 (arXiv 2205.05198, section
4), for what our layers keep for the backward pass: no dropout masks, a SwiGLU instead of a GELU, grouped-query
attention, and, as attention is fused and stays inside packed documents, nothing that grows with S². s is 1/t under
sequence parallelism, else 1:

    norms      2 · (e·h + 4)·s                  their inputs and statistics
    linear in  2 · e·h·s                        inputs of QKV and of gate and up, as sequence parallelism shards them
    attention  e·(N+2K)·D/t + e·(N+K)·D/t       QKV as projected (v is a view of it); q and k once rotated
               + e·N·D/t + 4·N/t                output, softmax statistics
    MLP        4·e·f/t                          gate and up, silu(gate), their product

Our own attention (`native`, and always on a CPU) rotates q and k itself: e·(3N+2K)·D/t + 4·N/t, of which N is
megatron-core's copy of q out of QKV (none for K = t and for K = N: then it is a view). On a CPU SwiGLU keeps only its
input, 3·e·f/t.

Recomputing attention (`selective`) drops rotated q and k and the statistics, and keeps q as it was before its rotation,
a copy or a view as above; `full` keeps e·h·s per layer, and everything above for the one layer that is being
recomputed.

Context parallelism (c ranks) keeps, unless attention is recomputed, the keys and values of all ranks, the outputs of
two spans beside what they are joined to, and instead of QKV as projected: q and k once rotated, k for each span, and
the rows of the rotation tables that turned q: e·(3N + (3c+½)·K)·D/t + 4·D + 4·N/t. Our own attention keeps q before its
rotation, e·(3N+2c·K)·D/t + 4·N/t where it is a copy, and 2K more where it is a view. For several documents in a
sequence this is an upper bound.

Adapters: a frozen matrix keeps no input; the A of an adapter keeps it instead, and what lies between A and B is e·r per
token for each, r the rank. Dropout keeps a mask of a byte for each input of the adapted matrices (h for QKV, N·D, h for
gate and up, f), whole on every tensor-parallel rank, and o_proj's input once more with its zeros. On the first layer,
where nothing before the adapters learns, a little less is kept than is counted.

Micro-batches alive on stage p of P with m micro-batches: min(m, P-p); with v chunks per stage min(m·v, 2(P-p-1) +
(v-1)·P + 1) chunks (Narayanan et al. 2021, arXiv 2104.04473). Each also keeps two fp32 rotation tables of D/2 for each
token of all context-parallel ranks. Sequence parallelism gathers its inputs in one buffer of e·h per token.

tests/planner/test_memory.py compares these with the bytes that real steps of a tiny model keep, on CPUs;
tests/flows/trace/test_presets.py with the traced step on a pretended GPU. The allowance has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from meditron_train.config.finetuning import LoraSection, num_adapter_parameters
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout
from meditron_train.planner.checkpoint_size import BYTES_PER_PARAMETER
from meditron_train.planner.hardware import find_hardware

_GIB = 2**30
_ALLOWANCE_BYTES = 3 * _GIB
_ALLOWANCE_SHARE = 0.05
_GRADIENT_BYTES = 4
_LOGITS_BLOCK = 2**24  # elements that the cross-entropy on a GPU takes at a time, in fp32
_OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of pipeline stage `stage`."""

    stage: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def counted(self) -> int:
        """What the formulas count."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    @property
    def allowance(self) -> int:
        """What they do not: context, communication buffers, fragmentation."""
        return _ALLOWANCE_BYTES + round(_ALLOWANCE_SHARE * self.counted)

    @property
    def total(self) -> int:
        return self.counted + self.allowance


def estimate_stages(
    config: Config, model: ModelConfig, layout: ParallelLayout, *, on_gpu: bool = True
) -> list[MemoryEstimate]:
    """The estimate of every pipeline stage. `layout` must be sound (see `check_config`)."""
    return [_estimate(config, model, layout, stage, on_gpu) for stage in range(layout.pipeline)]


def fullest_stage(config: Config, model: ModelConfig, layout: ParallelLayout) -> MemoryEstimate:
    """The stage that needs the most: usually the first, which keeps the most micro-batches.

    Of the stages between first and last that have as many layers, the earliest keeps the most.
    """
    counts = layout.layer_counts(model.num_layers)[: layout.pipeline]
    stages = {0, layout.pipeline - 1, *(counts.index(count, 1) for count in {*counts[1:-1]})}
    estimates = [_estimate(config, model, layout, stage, on_gpu=True) for stage in sorted(stages)]
    return max(estimates, key=lambda estimate: estimate.total)


def require_fit(estimate: MemoryEstimate, gpu: str) -> None:
    """Check that the estimate fits into the memory of `gpu`.

    Raises:
        UserError: it does not, or the memory is unknown.
    """
    available = find_hardware(gpu).memory_bytes
    if estimate.total <= available:
        return
    raise UserError(
        f"this does not fit: pipeline stage {estimate.stage} needs about {estimate.total / _GIB:.0f} GiB per GPU, "
        f"{gpu} has {available / _GIB:.0f} ({describe(estimate)}). Raise parallel.tensor, parallel.pipeline or the "
        "number of nodes, lower train.micro_batch_size, or choose train.recompute=full"
    )


def describe(estimate: MemoryEstimate) -> str:
    """The parts, in GiB, the largest first."""
    parts = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations": estimate.activations,
        "logits": estimate.logits,
        "allowance": estimate.allowance,
    }
    listed = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {num_bytes / _GIB:.1f}" for name, num_bytes in listed if num_bytes)


def _estimate(
    config: Config, model: ModelConfig, layout: ParallelLayout, stage: int, on_gpu: bool
) -> MemoryEstimate:
    precision = config.train.precision
    num_parameters = stage_parameters(model, layout, stage, config.parallel.vocab_multiple)
    shards = layout.data * layout.context if config.parallel.distributed_optimizer else 1
    is_last = stage == layout.pipeline - 1
    tokens = _tokens_per_microbatch(config, layout)
    num_trained = num_parameters
    if config.lora is not None:
        num_trained = num_adapter_parameters(
            config.lora, model, num_layers=len(layout.layers_on(stage, model.num_layers)), tp=layout.tensor
        )
        num_parameters += num_trained
    return MemoryEstimate(
        stage=stage,
        num_parameters=num_parameters,
        weights=BYTES_PER_PARAMETER[precision] * num_parameters,
        gradients=_GRADIENT_BYTES * num_trained,
        optimizer=_OPTIMIZER_BYTES[precision] * num_trained // shards,
        activations=_activations(config, model, layout, stage, on_gpu),
        logits=_logits(config, model, layout, tokens, on_gpu) if is_last else 0,
    )


def stage_parameters(model: ModelConfig, layout: ParallelLayout, stage: int, vocab_multiple: int) -> int:
    """Parameters that one rank of `stage` holds, vocabulary padding included; norms are on every tensor rank."""
    num_layers = len(layout.layers_on(stage, model.num_layers))
    norms = 2 * model.hidden_size
    per_layer = (model.num_layer_parameters - norms) // layout.tensor + norms
    vocabulary = model.padded_vocab_size(layout.tensor, vocab_multiple) // layout.tensor * model.hidden_size
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    # A tied output layer needs the embedding's weight: its own copy where the embedding is on another stage.
    num_vocabularies = is_first + (is_last and not (model.tie_embeddings and is_first))
    return num_layers * per_layer + num_vocabularies * vocabulary + is_last * model.hidden_size


def _tokens_per_microbatch(config: Config, layout: ParallelLayout) -> int:
    return config.train.seq_len * config.train.micro_batch_size // layout.context


def _logits(config: Config, model: ModelConfig, layout: ParallelLayout, tokens: int, on_gpu: bool) -> int:
    columns = model.padded_vocab_size(layout.tensor, config.parallel.vocab_multiple) // layout.tensor
    element = BYTES_PER_PARAMETER[config.train.precision]
    blocks = 2 * 4 * min(tokens * columns, _LOGITS_BLOCK) if on_gpu else 0
    return tokens * columns * element + blocks


def layer_activation_bytes_per_token(
    model: ModelConfig,
    layout: ParallelLayout,
    *,
    precision: str,
    recompute: str,
    on_gpu: bool,
    attends_unrotated: bool = False,
    lora: LoraSection | None = None,
) -> float:
    """What one layer keeps of one token for the backward pass (the table on top of this file).

    Args:
        attends_unrotated: the attention rotates queries and keys itself, as ours does.
    """
    element, tensor = BYTES_PER_PARAMETER[precision], layout.tensor
    width = model.hidden_size * _shard(layout)
    if recompute == "full":
        return element * width
    keeps = _KeptInputs.of(lora)
    heads = model.num_heads * model.head_dim / tensor
    is_rotated_before = on_gpu and not attends_unrotated
    elements = width * (2 + keeps.qkv + keeps.gate_up)  # the norms' inputs and their own
    elements += _attention_elements(model, layout, recompute=recompute, is_rotated_before=is_rotated_before)
    # The attention's output is kept by the attention itself, but where it is computed again or joined of two.
    elements += heads * (keeps.output or (recompute == "none" and layout.context == 1))
    elements += model.intermediate_size / tensor * ((3 if on_gpu else 2) + keeps.down)
    statistics = 2 * 4 * _shard(layout)
    if recompute == "none":
        statistics += 4 * model.num_heads / tensor
        if layout.context > 1 and is_rotated_before:
            statistics += 4 * model.head_dim  # the tables' rows of the queries, copied
    adapters = 0.0
    if lora is not None:
        adapters = _adapter_bytes(model, layout, lora, element)
        if lora.dropout and keeps.output and recompute == "none" and layout.context == 1:
            adapters += element * heads  # with zeros, beside the attention's own
    return element * elements + statistics + adapters


class _KeptInputs(NamedTuple):
    """Which matrices of a layer keep their inputs: those that learn. Of joined ones it is enough that one does."""

    qkv: bool = True
    output: bool = True
    gate_up: bool = True
    down: bool = True

    @classmethod
    def of(cls, lora: LoraSection | None) -> _KeptInputs:
        if lora is None:
            return cls()
        names = set(lora.targets)
        return cls(
            bool(names & {"q_proj", "k_proj", "v_proj"}),
            "o_proj" in names,
            bool(names & {"gate_proj", "up_proj"}),
            "down_proj" in names,
        )


def _adapter_bytes(model: ModelConfig, layout: ParallelLayout, lora: LoraSection, element: int) -> float:
    """What the adapters of one layer keep of one token beside the inputs of their A."""
    names = set(lora.targets)
    num_rows = len(names & {"o_proj", "down_proj"})
    between = element * lora.rank * (len(names) - num_rows + num_rows * _shard(layout))
    if not lora.dropout:
        return between
    # A byte for each input, whole on every tensor-parallel rank.
    keeps = _KeptInputs.of(lora)
    masks = model.hidden_size * (keeps.qkv + keeps.gate_up)
    masks += model.num_heads * model.head_dim * keeps.output + model.intermediate_size * keeps.down
    return between + masks


def _attention_elements(
    model: ModelConfig, layout: ParallelLayout, *, recompute: str, is_rotated_before: bool
) -> float:
    """Numbers that the attention of one layer keeps of one token, but for what it gives to the next matrix."""
    tensor, context = layout.tensor, layout.context
    heads, kv_heads = model.num_heads * model.head_dim / tensor, model.num_kv_heads * model.head_dim / tensor
    projected = heads + 2 * kv_heads
    # Of one group of heads, and where each query head has a group of its own, q is a view of what was projected.
    is_copied = tensor < model.num_kv_heads < model.num_heads
    copied = heads if is_copied else 0
    if recompute == "selective":  # what is computed again begins here
        return projected + copied
    if context == 1:
        return projected + (heads + kv_heads if is_rotated_before else copied)
    # Keys and values of all ranks; the outputs of the two spans, which are then joined.
    gathered = 2 * context * kv_heads + heads
    if is_rotated_before:  # the keys of each span apart: together half a rank's more than those of all ranks
        return gathered + heads + (context + 1 / 2) * kv_heads
    return gathered + (copied or projected)


def _shard(layout: ParallelLayout) -> float:
    """Share of the tokens that a rank keeps between the matrices."""
    return 1 / layout.tensor if layout.sequence else 1.0


def microbatches_alive(layout: ParallelLayout, stage: int, num_microbatches: int) -> int:
    """Chunk-passes that wait for their backward pass on `stage` at most, each over layers/(P·v) layers."""
    chunks = layout.virtual_pipeline
    if chunks == 1:
        return min(num_microbatches, layout.pipeline - stage)
    warmup = 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline
    return min(num_microbatches * chunks, warmup + 1)


def _activations(config: Config, model: ModelConfig, layout: ParallelLayout, stage: int, on_gpu: bool) -> int:
    train, element = config.train, BYTES_PER_PARAMETER[config.train.precision]
    tokens = _tokens_per_microbatch(config, layout)
    num_microbatches = train.global_batch_size // (train.micro_batch_size * layout.data)
    alive = microbatches_alive(layout, stage, num_microbatches)
    layers_per_chunk = len(layout.layers_of(stage, 0, model.num_layers))
    width = model.hidden_size * _shard(layout)
    kept = {
        recompute: layer_activation_bytes_per_token(
            model,
            layout,
            precision=train.precision,
            recompute=recompute,
            on_gpu=on_gpu,
            attends_unrotated=train.attention == "native",
            lora=config.lora,
        )
        for recompute in (train.recompute, "none")
    }
    tables = 4 * model.head_dim * layout.context + 8 * (layout.context > 1)  # and the places of the queries
    per_token = layers_per_chunk * kept[train.recompute] + tables
    total = alive * per_token * tokens
    if train.recompute == "full":
        total += kept["none"] * tokens
    if layout.sequence and layout.tensor > 1:  # the buffer in which inputs are gathered
        total += element * model.hidden_size * tokens
    if config.lora is not None and train.recompute != "full":  # the A of joined matrices, joined
        num_joined = sum(name not in ("o_proj", "down_proj") for name in config.lora.targets)
        total += alive * layers_per_chunk * element * num_joined * config.lora.rank * model.hidden_size
    if stage == layout.pipeline - 1:  # the final norm and, where it learns, the input of the output layer
        total += ((1 + (config.lora is None)) * element * width + 4 * _shard(layout)) * tokens
    return round(total)
