"""Low-rank adapters (Hu et al. 2021, LoRA) on megatron-core's tensor-parallel linear layers.

Each adapted matrix of the Hugging Face model has its own A and B, as in PEFT, also where megatron-core joins several
(query|key|value, gate|up): so a rank's share of B is a run of rows, in any layout.

| layer           | x of a rank                     | A                | B                   | summed over TP   |
|-----------------|---------------------------------|------------------|---------------------|------------------|
| column-parallel | all inputs (SP: of its tokens)  | whole            | rows of its outputs | gradient of A·x  |
| row-parallel    | its inputs                      | columns of those | whole               | A·x              |

What lies between A and B is `rank` wide: the only thing that tensor parallelism communicates for an adapter. Under
sequence parallelism it is gathered (column) or reduced and scattered (row) over the tokens instead; the whole A or B
then has seen a part of the tokens alone, and megatron-core adds up its gradient, as it does for norms.

Legend: L packed tokens of this context-parallel rank, S of these the ones in the input (L/tp in front of a
column-parallel layer under sequence parallelism), I inputs, O outputs of this rank, R rank of the adapters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.mcore import (
    ColumnParallelLinear,
    ModuleSpec,
    RowParallelLinear,
    TransformerLayer,
    make_sharded_tensors_for_checkpoint,
    tensor_parallel,
)


@dataclass(frozen=True)
class DropoutPlace:
    """Which micro-batch is being computed, and which of its tokens are here.

    Attributes:
        seed: of everything that is dropped in this micro-batch.
        num_tokens: of the whole micro-batch.
        local_index: int64 [L], the places of this rank's tokens in it; None when all are here.
    """

    seed: int
    num_tokens: int
    local_index: torch.Tensor | None


def _add_adapter(layer: Any, name: str, num_inputs: int, num_outputs: int, rank: int) -> None:
    """Give the layer A [R, I] and B [O, R] of a matrix, uninitialised.

    They are the layer's own parameters, not those of a module inside: megatron-core gathers what the distributed
    optimizer has updated, if that overlaps, when the module is called to which a parameter belongs.
    """
    for half, shape in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
        empty = torch.empty(shape, dtype=layer.config.params_dtype)
        layer.register_parameter(f"{name}_lora_{half}", torch.nn.Parameter(empty))


class _Dropout:
    """Zeroes inputs of A. What falls out depends on the seed, the layer and the place in the whole micro-batch alone.

    Each rank draws the mask of the whole micro-batch, a byte for each input, and keeps its part.
    """

    def __init__(self, rate: float, name: str) -> None:
        self._rate, self._name = rate, name
        self.layer_number = 0
        self.place: DropoutPlace | None = None  # set by the layer before it computes

    def __call__(self, x_S1I: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """x with its share of zeros.

        Args:
            x_S1I: this rank's part.
            rows, columns: its number and the number of parts, of the tokens and of the inputs.
        """
        assert self.place is not None
        place, num_inputs = self.place, x_S1I.shape[-1] * columns[1]
        digest = hashlib.sha256(f"{place.seed}/{self.layer_number}/{self._name}".encode()).digest()
        generator = torch.Generator(x_S1I.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        mask = torch.empty(place.num_tokens, num_inputs, dtype=torch.bool, device=x_S1I.device)
        mask = mask.bernoulli_(1 - self._rate, generator=generator)
        if place.local_index is not None:
            mask = mask[place.local_index]
        mask_SI = mask.chunk(rows[1])[rows[0]].chunk(columns[1], dim=1)[columns[0]]
        return x_S1I * mask_SI[:, None] / (1 - self._rate)


class AdaptedColumnLinear(ColumnParallelLinear):
    """A column-parallel layer, of one or several joined matrices, with adapters.

    Args:
        lora: settings.
        heights: rows of each joined matrix in one group of this layer's rows, the adapted ones and the others.
        num_groups: groups of this rank (see `checkpoint/tensor_map.py`: a KV head's q, k and v rows are one group).
    """

    def __init__(
        self, *args: Any, lora: LoraSection, heights: Mapping[str, int], num_groups: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lora, self._heights, self._num_groups = lora, heights, num_groups
        self._adapted = [name for name in heights if name in lora.targets]
        for name in self._adapted:
            _add_adapter(self, name, self.input_size, heights[name] * num_groups, lora.rank)
            getattr(self, f"{name}_lora_A").sequence_parallel = self.sequence_parallel
        self.dropout = _Dropout(lora.dropout, "+".join(heights)) if lora.dropout else None

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """[S, 1, I] -> [L, 1, O], and the bias that megatron-core would add later (None)."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self._lora.scale * self._product(input_), bias

    def _product(self, x_S1I: torch.Tensor) -> torch.Tensor:
        """B·A·x [L, 1, O], its columns in the order of this layer's rows."""
        group = self.tp_group
        if self.dropout is not None and self.training:
            parts = (group.rank(), group.size()) if self.sequence_parallel else (0, 1)
            x_S1I = self.dropout(x_S1I, parts, (0, 1))
        down = F.linear(x_S1I, torch.cat([getattr(self, f"{name}_lora_A") for name in self._adapted]))
        if self.sequence_parallel:
            down = tensor_parallel.gather_from_sequence_parallel_region(down, group=group)
        else:
            down = tensor_parallel.copy_to_tensor_model_parallel_region(down, group=group)
        ups = {
            name: F.linear(part, getattr(self, f"{name}_lora_B"))
            for name, part in zip(self._adapted, down.split(self._lora.rank, dim=-1), strict=True)
        }
        num_tokens = down.shape[0]
        by_group = [
            ups[name].view(num_tokens, 1, self._num_groups, height)
            if name in ups
            else down.new_zeros(num_tokens, 1, self._num_groups, height)
            for name, height in self._heights.items()
        ]
        return torch.cat(by_group, dim=-1).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Weight, bias and every B are split by rows."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0, **{f"{name}_lora_B": 0 for name in self._adapted}},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptedRowLinear(RowParallelLinear):
    """A row-parallel layer with an adapter.

    Args:
        lora: settings.
        name: of its matrix in Hugging Face's layer.
    """

    def __init__(self, *args: Any, lora: LoraSection, name: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lora, self._name = lora, name
        _add_adapter(self, name, self.input_size_per_partition, self.output_size, lora.rank)
        getattr(self, f"{name}_lora_B").sequence_parallel = self.sequence_parallel
        self.dropout = _Dropout(lora.dropout, name) if lora.dropout else None

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """[L, 1, I] -> [S, 1, O], and the bias that megatron-core would add later (None)."""
        output, bias = super().forward(input_)
        group = self.tp_group
        if self.dropout is not None and self.training:
            input_ = self.dropout(input_, (0, 1), (group.rank(), group.size()))
        down = F.linear(input_, getattr(self, f"{self._name}_lora_A"))
        if self.sequence_parallel:
            down = tensor_parallel.reduce_scatter_to_sequence_parallel_region(down, group=group)
        else:
            down = tensor_parallel.reduce_from_tensor_model_parallel_region(down, group=group)
        return output + self._lora.scale * F.linear(down, getattr(self, f"{self._name}_lora_B")), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Weight and A are split by columns."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, f"{self._name}_lora_A": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class DropoutLayer(TransformerLayer):
    """megatron-core's layer, which tells its adapters what micro-batch they see; also when it is computed again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adapted = (m for m in self.modules() if isinstance(m, AdaptedColumnLinear | AdaptedRowLinear))
        self._dropouts = [module.dropout for module in adapted if module.dropout is not None]
        for dropout in self._dropouts:
            dropout.layer_number = self.layer_number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for dropout in self._dropouts:
            dropout.place = kwargs["packed_seq_params"].dropout
        return super().forward(*args, **kwargs)


def adapt_layer(layer: ModuleSpec, lora: LoraSection, model: ModelConfig, tp_size: int) -> None:
    """Put adapters into the description of a layer."""
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    queries = model.num_heads // model.num_kv_heads * model.head_dim
    qkv = {"q_proj": queries, "k_proj": model.head_dim, "v_proj": model.head_dim}
    gate_up = dict.fromkeys(("gate_proj", "up_proj"), model.intermediate_size // tp_size)
    columns = (
        (attention, "linear_qkv", qkv, model.num_kv_heads // tp_size),
        (mlp, "linear_fc1", gate_up, 1),
    )
    for submodules, place, heights, num_groups in columns:
        if set(heights) & set(lora.targets):
            params = {"lora": lora, "heights": heights, "num_groups": num_groups}
            setattr(submodules, place, ModuleSpec(AdaptedColumnLinear, params=params))
    for submodules, place, name in ((attention, "linear_proj", "o_proj"), (mlp, "linear_fc2", "down_proj")):
        if name in lora.targets:
            setattr(submodules, place, ModuleSpec(AdaptedRowLinear, params={"lora": lora, "name": name}))
    if lora.dropout:
        layer.module = DropoutLayer


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(("_lora_A", "_lora_B"))


def initial_adapter(name: str, rank: int, num_inputs: int, seed: int) -> torch.Tensor:
    """The whole A [rank, num_inputs] before the first step, fp32: uniform in ±1/sqrt(num_inputs), as PEFT has it.

    A function of the seed and the name in the whole model alone. B starts at 0, so that the model starts as its base.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=generator)
