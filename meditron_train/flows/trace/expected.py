"""What the layout says that a rank holds and sends: derived by hand, to be compared with what a trace saw.

Calls for one micro-batch in the tensor-parallel group (Korthikanti et al. 2022, section 4.2.2; forward + backward):

| part          | with sequence parallelism                        | without         |
|---------------|--------------------------------------------------|-----------------|
| each layer    | all-gather 2 + 4, reduce-scatter 2 + 2           | all-reduce 2 + 2 |
| embedding     | reduce-scatter 1, all-gather 1                   | all-reduce 1    |
| output layer  | all-gather 1 + 1, reduce-scatter 0 + 1           | all-reduce 0 + 1 |
| cross-entropy | all-reduce 2                                     | all-reduce 2    |

The backward gathers each input of a matrix split by columns once more, as it was not kept. `recompute: full` repeats
the forward of each layer. At the end, sequence parallelism adds up the gradients of the norms: one all-reduce.
"""

from __future__ import annotations

from collections import Counter

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.layout import ParallelLayout

Calls = Counter[tuple[str, str]]
"""(kind, group) -> calls."""

_LAYER_PARAMETERS = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


def expected_parameters(model: ModelConfig, layout: ParallelLayout, stage: int) -> list[str]:
    """Names, in the whole model, of the parameters that a rank of `stage` holds."""
    names = []
    for chunk in range(layout.virtual_pipeline):
        for layer in layout.layers_of(stage, chunk, model.num_layers):
            names += [f"decoder.layers.{layer}.{name}" for name in _LAYER_PARAMETERS]
            if model.has_qkv_bias:
                names.append(f"decoder.layers.{layer}.self_attention.linear_qkv.bias")
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    if is_first:
        names.append("embedding.word_embeddings.weight")
    if is_last:
        names.append("decoder.final_layernorm.weight")
        if not (model.tie_embeddings and is_first):
            names.append("output_layer.weight")
    return names


def expected_collectives(
    config: Config, model: ModelConfig, layout: ParallelLayout, stage: int, num_micro_batches: int
) -> Calls:
    """Calls of a step in the tensor, context and pipeline groups by a rank of `stage`."""
    num_layers = len(layout.layers_on(stage, model.num_layers))
    calls: Calls = Counter()
    for _ in range(num_micro_batches):
        calls += _tensor_calls(config, layout, stage, num_layers)
        calls += _context_calls(config, layout, num_layers)
        calls += _pipeline_calls(layout, stage)
    if layout.tensor > 1 and layout.sequence:
        calls["all-reduce", "tensor"] += 1
    if layout.pipeline > 1:
        calls["broadcast", "pipeline"] += 1  # the last stage tells how many labels count
    return calls


def _tensor_calls(config: Config, layout: ParallelLayout, stage: int, num_layers: int) -> Calls:
    calls: Calls = Counter()
    if layout.tensor == 1:
        return calls
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    forwards = 2 if config.train.recompute == "full" else 1
    if layout.sequence:
        calls["all-gather", "tensor"] = num_layers * (2 * forwards + 4) + is_first + 2 * is_last
        calls["reduce-scatter", "tensor"] = num_layers * (2 * forwards + 2) + is_first + is_last
        calls["all-reduce", "tensor"] = 2 * is_last
    else:
        calls["all-reduce", "tensor"] = num_layers * (2 * forwards + 2) + is_first + 3 * is_last
    return calls


def _context_calls(config: Config, layout: ParallelLayout, num_layers: int) -> Calls:
    """Keys and values are gathered, once more where attention is computed again; their gradients are scattered."""
    calls: Calls = Counter()
    if layout.context > 1:
        calls["all-gather", "context"] = num_layers * (1 if config.train.recompute == "none" else 2)
        calls["reduce-scatter", "context"] = num_layers
    return calls


def _pipeline_calls(layout: ParallelLayout, stage: int) -> Calls:
    """Between neighboring chunks an activation goes forward and its gradient comes back."""
    calls: Calls = Counter()
    last = layout.pipeline * layout.virtual_pipeline - 1
    for virtual_rank in range(layout.virtual_pipeline):
        chunk = virtual_rank * layout.pipeline + stage
        calls["send", "pipeline"] += (chunk < last) + (chunk > 0)
        calls["receive", "pipeline"] += (chunk > 0) + (chunk < last)
    return calls
