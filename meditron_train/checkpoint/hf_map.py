"""The one table between the tensors of a Hugging Face Llama and those of a sharded checkpoint, for both directions.

A sharded tensor is made of the rows of one or more Hugging Face tensors ("parts"), interleaved over `num_groups`:
group g holds rows g of the first part, then of the second, and so on. Three cases cover a Llama:

- one part: the same tensor (embedding and output layer are padded with zero rows at the end);
- query|key|value: one group per KV head: its query heads, its key head, its value head;
- gate|up: one group; a tensor-parallel rank holds its share of gate, then its share of up.

RoPE rotates halves on both sides, so query and key rows keep their order within a head.

Shape legend: V vocabulary, H hidden, F feed-forward, N query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

Shape = tuple[int, ...]

# Buffers that old releases of transformers stored; RoPE frequencies follow from the config.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a sharded checkpoint and the Hugging Face tensors it is made of.

    name: global name in the sharded checkpoint (megatron-core's, one entry per layer).
    hf_names, hf_shapes: the parts in order.
    kind: "direct", "vocab" (padded rows), "qkv" or "gate_up".
    shape: global shape, without vocabulary padding.
    tp_dim: the dimension that tensor parallelism splits, None when every rank holds the whole.
    num_groups: into how many groups the rows of the parts are interleaved.
    layer: 0-based layer number, None outside the layers.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    kind: Literal["direct", "vocab", "qkv", "gate_up"]
    shape: Shape
    tp_dim: int | None
    num_groups: int = 1
    layer: int | None = None

    def padded_shape(self, padded_vocab_size: int) -> Shape:
        """Global shape as stored: the vocabulary dimension padded to `padded_vocab_size` rows."""
        return (padded_vocab_size, *self.shape[1:]) if self.kind == "vocab" else self.shape


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + num_rows) of the tensor `source`; of None, zero rows.

    hf_name: the Hugging Face tensor that the rows belong to, None for padding.
    """

    source: str | None
    start: int
    num_rows: int
    hf_name: str | None


class TensorSource(Protocol):
    """What `rank_slice` reads from: `HFSource`, or anything with Hugging Face names."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor: ...


def tensor_specs(model: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model's sharded checkpoint, in the order of the layers."""
    H, F, D = model.hidden_size, model.intermediate_size, model.head_dim
    N, K, V = model.num_heads, model.num_kv_heads, model.vocab_size
    specs = [
        _single("embedding.word_embeddings.weight", "model.embed_tokens.weight", (V, H), 0, kind="vocab")
    ]
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        specs += [
            _single(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", (H,), None, i),
            TensorSpec(
                f"{ours}.self_attention.linear_qkv.weight",
                tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"),
                ((N * D, H), (K * D, H), (K * D, H)),
                "qkv",
                ((N + 2 * K) * D, H),
                tp_dim=0,
                num_groups=K,
                layer=i,
            ),
            _single(
                f"{ours}.self_attention.linear_proj.weight",
                f"{theirs}.self_attn.o_proj.weight",
                (H, N * D),
                1,
                i,
            ),
            _single(
                f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight", (H,), None, i
            ),
            TensorSpec(
                f"{ours}.mlp.linear_fc1.weight",
                (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
                ((F, H), (F, H)),
                "gate_up",
                (2 * F, H),
                tp_dim=0,
                layer=i,
            ),
            _single(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (H, F), 1, i),
        ]
    specs.append(_single("decoder.final_layernorm.weight", "model.norm.weight", (H,), None))
    if not model.tie_embeddings:
        specs.append(_single("output_layer.weight", "lm_head.weight", (V, H), 0, kind="vocab"))
    return specs


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor of the model (without `lm_head.weight` when tied)."""
    return {n: s for spec in tensor_specs(model) for n, s in zip(spec.hf_names, spec.hf_shapes, strict=True)}


def rank_slice(
    spec: TensorSpec, source: TensorSource, *, tp_rank: int = 0, tp_size: int = 1, padded_vocab_size: int
) -> torch.Tensor:
    """The part of `spec` that tensor-parallel rank `tp_rank` of `tp_size` holds, in the dtype of the source.

    Reads only the rows and columns it needs. With tp_size 1 it is the whole sharded tensor. Raises UserError when the
    split is uneven or the source's shapes are not those of the config.
    """
    for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True):
        if source.shape(name) != shape:
            raise UserError(f"{name} has shape {list(source.shape(name))}; the config says {list(shape)}.")
    _check_split(spec, tp_size, padded_vocab_size)
    if spec.kind == "vocab":
        return _read_vocab_rows(spec, source, tp_rank, padded_vocab_size // tp_size)
    if spec.tp_dim is None or tp_size == 1:
        return _interleave([source.read(name) for name in spec.hf_names], spec.num_groups)
    if spec.tp_dim == 1:
        width = spec.shape[1] // tp_size
        return source.read(spec.hf_names[0], columns=(tp_rank * width, (tp_rank + 1) * width))
    parts = []
    for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True):
        height = shape[0] // tp_size
        parts.append(source.read(name, rows=(tp_rank * height, (tp_rank + 1) * height)))
    return _interleave(parts, spec.num_groups // tp_size if spec.kind == "qkv" else 1)


def to_megatron(
    spec: TensorSpec, tensors: Mapping[str, torch.Tensor], padded_vocab_size: int
) -> torch.Tensor:
    """The whole sharded tensor from whole Hugging Face tensors (name -> tensor), vocabulary padded with zero rows."""
    whole = _interleave([tensors[name] for name in spec.hf_names], spec.num_groups)
    missing_rows = spec.padded_shape(padded_vocab_size)[0] - whole.shape[0]
    return torch.cat([whole, whole.new_zeros(missing_rows, *whole.shape[1:])]) if missing_rows else whole


def to_hf(spec: TensorSpec, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors (contiguous) in a whole sharded tensor; vocabulary padding is removed."""
    if len(spec.hf_names) == 1:
        return {spec.hf_names[0]: tensor[: spec.shape[0]].contiguous()}
    heights = [shape[0] // spec.num_groups for shape in spec.hf_shapes]
    grouped = tensor.view(spec.num_groups, sum(heights), *tensor.shape[1:])
    parts = grouped.split(heights, dim=1)
    return {
        name: part.reshape(shape)
        for name, shape, part in zip(spec.hf_names, spec.hf_shapes, parts, strict=True)
    }


def megatron_pieces(spec: TensorSpec, padded_vocab_size: int) -> list[Piece]:
    """The rows of Hugging Face tensors that make up the whole sharded tensor, in order."""
    heights = [shape[0] // spec.num_groups for shape in spec.hf_shapes]
    pieces = [
        Piece(name, group * height, height, name)
        for group in range(spec.num_groups)
        for name, height in zip(spec.hf_names, heights, strict=True)
    ]
    num_padding_rows = spec.padded_shape(padded_vocab_size)[0] - spec.shape[0]
    return [*pieces, Piece(None, 0, num_padding_rows, None)] if num_padding_rows else pieces


def hf_pieces(spec: TensorSpec, hf_name: str) -> list[Piece]:
    """The rows of the sharded tensor that make up one of its Hugging Face tensors, in order."""
    heights = [shape[0] // spec.num_groups for shape in spec.hf_shapes]
    part = spec.hf_names.index(hf_name)
    first, step = sum(heights[:part]), sum(heights)
    return [
        Piece(spec.name, group * step + first, heights[part], hf_name) for group in range(spec.num_groups)
    ]


def check_source(source: TensorSource, model: ModelConfig, where: str) -> None:
    """Raise one UserError that lists every missing, unexpected or wrongly shaped tensor of a Hugging Face source."""
    expected = hf_shapes(model)
    found = set(source.names)
    optional = {"lm_head.weight"} if model.tie_embeddings else set()
    missing = [name for name in expected if name not in found]
    extra = sorted(n for n in found - set(expected) - optional if not is_ignored(n))
    wrong = [
        f"{name} has shape {list(source.shape(name))}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and source.shape(name) != shape
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {_some(missing)}")
    if extra:
        hint = (
            " (LoRA weights left in: merge them into the model first)"
            if any("lora_" in n for n in extra)
            else ""
        )
        problems.append(f"tensors that a Llama of this config does not have: {_some(extra)}{hint}")
    if wrong:
        problems.append(f"wrong shapes: {_some(wrong)}")
    if problems:
        advice = "The weights and config.json do not belong together; fetch both from the same place again."
        raise UserError(f"{where}: " + "; ".join(problems) + f". {advice}")


def _single(
    name: str,
    hf_name: str,
    shape: Shape,
    tp_dim: int | None,
    layer: int | None = None,
    kind: Literal["direct", "vocab"] = "direct",
) -> TensorSpec:
    return TensorSpec(name, (hf_name,), (shape,), kind, shape, tp_dim, layer=layer)


def _interleave(parts: Sequence[torch.Tensor], num_groups: int) -> torch.Tensor:
    """Rows of the parts, group by group: [group 0 of part 0, group 0 of part 1, …, group 1 of part 0, …]."""
    if len(parts) == 1:
        return parts[0]
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(num_groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def _check_split(spec: TensorSpec, tp_size: int, padded_vocab_size: int) -> None:
    if spec.kind == "vocab":
        units, what = padded_vocab_size, "padded vocabulary rows"
        if padded_vocab_size < spec.shape[0]:
            raise UserError(
                f"{spec.name}: {padded_vocab_size} padded rows are fewer than the {spec.shape[0]} of the model."
            )
    elif spec.kind == "qkv":
        units, what = spec.num_groups, "KV heads"
    elif spec.tp_dim is not None:
        units, what = (spec.hf_shapes[0][spec.tp_dim], "rows" if spec.tp_dim == 0 else "columns")
    else:
        return
    if units % tp_size:
        raise UserError(f"{spec.name}: {units} {what} cannot be split over {tp_size} tensor-parallel ranks.")


def _read_vocab_rows(spec: TensorSpec, source: TensorSource, tp_rank: int, height: int) -> torch.Tensor:
    """Rows [tp_rank * height, (tp_rank + 1) * height) of the padded tensor; rows past the vocabulary are zero."""
    name, (num_rows, width) = spec.hf_names[0], spec.shape
    start, stop = min(tp_rank * height, num_rows), min((tp_rank + 1) * height, num_rows)
    tensor = torch.zeros(height, width, dtype=source.dtype(name))
    if start < stop:
        tensor[: stop - start] = source.read(name, rows=(start, stop))
    return tensor


def is_ignored(name: str) -> bool:
    """Whether a Hugging Face tensor is a buffer that follows from the config and carries no weights."""
    return bool(_IGNORED.search(name))


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
