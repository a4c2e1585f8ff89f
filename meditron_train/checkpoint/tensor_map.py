"""The one table between the tensors of a Hugging Face model and those of a sharded checkpoint, for both directions.

A sharded tensor is made of the rows of one or more Hugging Face tensors ("parts"), interleaved over `num_groups`:
group g holds rows g of the first part, then of the second, and so on. Three cases cover every family:

- one part: the same tensor (embedding and output layer are padded with zero rows at the end);
- query|key|value, weights or biases: one group per KV head: its query heads, its key head, its value head;
- gate|up: one group; a tensor-parallel rank holds its share of gate, then its share of up.

RoPE rotates halves on both sides, so query and key rows keep their order within a head.

Shape legend: V vocabulary, H hidden, F feed-forward, N query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from meditron_train.checkpoint.files.stored import Shape, Tensors
from meditron_train.config.model_config import Family, ModelConfig
from meditron_train.errors import UserError
from meditron_train.layout import split_dim

# Buffers that old releases of transformers stored; RoPE frequencies follow from the config.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

# What is added to names by those who save a part of a model, or a model inside of another: (what, pattern, instead).
_WRAPPERS = r"(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
_NAMINGS = (
    (
        "are those of a wrapper (DistributedDataParallel, torch.compile, FSDP or PEFT)",
        re.compile(rf"(?<![^.]){_WRAPPERS}"),
        "",
    ),
    ("are those of a part of a larger model", re.compile(r"^(model\.)?(language_model|text_model)\."), r"\1"),
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a sharded checkpoint and the Hugging Face tensors it is made of.

    Attributes:
        name: global name in the sharded checkpoint (megatron-core's, one entry per layer).
        hf_names, hf_shapes: the parts in order.
        kind: "direct", "vocab" (padded rows), "qkv" or "gate_up".
        shape: global shape, without vocabulary padding.
        num_groups: into how many groups the rows of the parts are interleaved.
        layer: 0-based layer number; None outside the layers.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    kind: Literal["direct", "vocab", "qkv", "gate_up"]
    shape: Shape
    num_groups: int = 1
    layer: int | None = None

    @property
    def tp_dim(self) -> int | None:
        """The dimension that tensor parallelism splits, None when every rank holds the whole."""
        return split_dim(self.name)

    def padded_shape(self, padded_vocab_size: int) -> Shape:
        """Global shape as stored: the vocabulary dimension padded to `padded_vocab_size` rows."""
        return (padded_vocab_size, *self.shape[1:]) if self.kind == "vocab" else self.shape


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + num_rows) of the tensor `source`; of None, zero rows.

    Attributes:
        hf_name: the Hugging Face tensor that the rows belong to; None for padding.
    """

    source: str | None
    start: int
    num_rows: int
    hf_name: str | None


class TensorSource(Tensors, Protocol):
    """What `rank_slice` reads from: `HFSource`, or anything with Hugging Face names."""

    @property
    def names(self) -> Sequence[str]: ...

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Row:
    """One tensor of a layer: its name there, its parts in Hugging Face, and what `TensorSpec` says of it.

    Shapes are spelled in letters: H hidden, F feed-forward, Q all query heads, K all KV heads.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[str, ...]
    kind: Literal["direct", "qkv", "gate_up"] = "direct"


_LLAMA_ROWS = (
    _Row("input_layernorm.weight", ("input_layernorm.weight",), ("H",)),
    _Row(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ("QH", "KH", "KH"),
        kind="qkv",
    ),
    _Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("HQ",)),
    _Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ("H",)),
    _Row(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("FH", "FH"),
        kind="gate_up",
    ),
    _Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ("HF",)),
)
_QKV_BIAS = _Row(
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ("Q", "K", "K"),
    kind="qkv",
)
LAYER_ROWS: dict[Family, tuple[_Row, ...]] = {
    "llama": _LLAMA_ROWS,
    "mistral": _LLAMA_ROWS,
    "qwen2": (*_LLAMA_ROWS, _QKV_BIAS),
}


def tensor_specs(model: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model's sharded checkpoint, in the order of the layers."""
    V, H = model.vocab_size, model.hidden_size
    embedding = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    specs = [_vocabulary_spec(*embedding, (V, H))]
    for layer in range(model.num_layers):
        specs += [_layer_spec(row, layer, model) for row in LAYER_ROWS[model.family]]
    norm = "model.norm.weight"
    specs.append(TensorSpec("decoder.final_layernorm.weight", (norm,), ((H,),), "direct", (H,)))
    if not model.tie_embeddings:
        specs.append(_vocabulary_spec("output_layer.weight", "lm_head.weight", (V, H)))
    return specs


def _layer_spec(row: _Row, layer: int, model: ModelConfig) -> TensorSpec:
    heads = {"Q": model.num_heads * model.head_dim, "K": model.num_kv_heads * model.head_dim}
    sizes = {"H": model.hidden_size, "F": model.intermediate_size, **heads}
    shapes = tuple(tuple(sizes[letter] for letter in letters) for letters in row.hf_shapes)
    return TensorSpec(
        f"decoder.layers.{layer}.{row.name}",
        tuple(f"model.layers.{layer}.{name}" for name in row.hf_names),
        shapes,
        row.kind,
        (sum(shape[0] for shape in shapes), *shapes[0][1:]),
        num_groups=model.num_kv_heads if row.kind == "qkv" else 1,
        layer=layer,
    )


def _vocabulary_spec(name: str, hf_name: str, shape: Shape) -> TensorSpec:
    return TensorSpec(name, (hf_name,), (shape,), "vocab", shape)


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor of the model (without `lm_head.weight` when tied)."""
    return {n: s for spec in tensor_specs(model) for n, s in zip(spec.hf_names, spec.hf_shapes, strict=True)}


def rank_slice(
    spec: TensorSpec, source: TensorSource, *, tp_rank: int = 0, tp_size: int = 1, padded_vocab_size: int
) -> torch.Tensor:
    """The part of `spec` that tensor-parallel rank `tp_rank` of `tp_size` holds, in the dtype of the source.

    Reads only the rows and columns it needs. With tp_size 1 it is the whole sharded tensor.

    Raises:
        UserError: the split is uneven, or the source's shapes are not those of the config.
    """
    for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True):
        if source.shape(name) != shape:
            raise UserError(f"{name} has shape {list(source.shape(name))}; the config says {list(shape)}")
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


@torch.no_grad()
def fill_parameters(
    parameters: Mapping[str, torch.Tensor],
    model: ModelConfig,
    source: TensorSource,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> None:
    """Fill a rank's parameters, given under their names in the whole model, reading only what the rank holds.

    Raises:
        UserError: as `rank_slice`.
    """
    specs = {spec.name: spec for spec in tensor_specs(model)}
    for name, parameter in parameters.items():
        if name == "output_layer.weight" and model.tie_embeddings:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of it
        parameter.copy_(
            rank_slice(
                specs[name], source, tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=padded_vocab_size
            )
        )


def sharded_pieces(spec: TensorSpec, padded_vocab_size: int) -> list[Piece]:
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
    """Check the names and shapes of a Hugging Face source.

    Raises:
        UserError: lists every missing, unexpected or wrongly shaped tensor.
    """
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
    if missing and (renamed := _other_names(found, expected)):
        raise UserError(f"{where}: {renamed}")
    problems = []
    if missing:
        problems.append(f"missing tensors: {_some(missing)}")
    if extra:
        hint = (
            " (LoRA weights left in: merge them into the model first)"
            if any("lora_" in n for n in extra)
            else ""
        )
        problems.append(f"tensors that a model of this config does not have: {_some(extra)}{hint}")
    if wrong:
        problems.append(f"wrong shapes: {_some(wrong)}")
    if problems:
        advice = "The weights and config.json do not belong together; fetch both from the same place again."
        raise UserError(f"{where}: " + "; ".join(problems) + f". {advice}")


def _other_names(found: Collection[str], expected: Collection[str]) -> str | None:
    """What to say of a model that is there under names that transformers does not load; None where it is not."""
    for what, pattern, replacement in _NAMINGS:
        named = {name: pattern.sub(replacement, name) for name in sorted(found) if not is_ignored(name)}
        changed = [(old, new) for old, new in named.items() if old != new]
        if changed and set(expected) <= set(named.values()):
            old, new = changed[0]
            return (
                f"the names of the tensors {what}: {old} must be {new}. transformers does not load them either: save "
                f"the model itself instead of its wrapper, or rename the tensors"
            )
    return None


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
                f"{spec.name}: {padded_vocab_size} padded rows are fewer than the {spec.shape[0]} of the model"
            )
    elif spec.kind == "qkv":
        units, what = spec.num_groups, "KV heads"
    elif spec.tp_dim is not None:
        units, what = (spec.hf_shapes[0][spec.tp_dim], "rows" if spec.tp_dim == 0 else "columns")
    else:
        return
    if units % tp_size:
        raise UserError(f"{spec.name}: {units} {what} cannot be split over {tp_size} tensor-parallel ranks")


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
