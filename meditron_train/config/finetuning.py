"""The keys of a finetuning that trains less than the whole model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.section import NUMBER, Count, Positive, Section

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
)  # fmt: skip


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, LoRA): to each chosen matrix W of the frozen model a product B·A is added, and
    only A and B are trained. Absent: the whole model is trained."""

    rank: Count
    """Rows of A and columns of B."""
    alpha: Positive | None = None
    """B·A is multiplied by alpha / rank (default: twice the rank)."""
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = PROJECTIONS
    """The adapted matrices of every layer, under their Hugging Face names."""
    dropout: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    """Share of the inputs of A that are zeroed in training. Which ones depends on train.seed, the step, the
    micro-batch and the matrix alone: the same in every layout and after a resume."""

    @model_validator(mode="after")
    def _check_targets(self) -> LoraSection:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("targets names a matrix twice")
        return self

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


def projection_shapes(model: ModelConfig) -> dict[Projection, tuple[int, int]]:
    """(outputs, inputs) of the matrices of a layer."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def num_adapter_parameters(
    lora: LoraSection, model: ModelConfig, *, num_layers: int | None = None, tp: int = 1
) -> int:
    """Of A and B on one of `tp` tensor-parallel ranks, over `num_layers` layers (None: all of the model).

    Of a matrix that is split by outputs a rank has the whole A and a part of B, of one split by inputs the reverse.
    """
    per_layer = 0
    for name in lora.targets:
        num_outputs, num_inputs = projection_shapes(model)[name]
        by_inputs = name in ("o_proj", "down_proj")
        per_layer += num_inputs // (tp if by_inputs else 1) + num_outputs // (1 if by_inputs else tp)
    return lora.rank * per_layer * (model.num_layers if num_layers is None else num_layers)
