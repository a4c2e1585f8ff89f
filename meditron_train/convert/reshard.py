"""From any checkpoint to Megatron's per-rank files (`--ckpt-format torch`) under a chosen layout.

Nothing here needs it: loading reshards. It is for other tools that want

    OUT/latest_checkpointed_iteration.txt
    OUT/iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt

with megatron-core's names of local layers. The optimizer's part is what megatron-core's plain (not distributed) Adam
loads: moments by number of the parameter, and fp32 masters where the weights are bf16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.export import HF_SUBDIRECTORY, read_generation_config
from meditron_train.checkpoint.foreign import (
    TRACKER,
    ForeignOptions,
    ForeignSource,
    is_foreign_directory,
    load_common,
)
from meditron_train.checkpoint.hf_map import TensorSpec, tensor_specs
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.megatron_read import MegatronSource
from meditron_train.checkpoint.stored import Range, Shape
from meditron_train.checkpoint.stream import PlannedFile
from meditron_train.checkpoint.tokenizer_files import copy_tokenizer
from meditron_train.checkpoint.workspace import Alone, publish, require_absent, workspace
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

Progress = Callable[[str, int, int], None]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = ("param", "fp32_param")  # the first with a distributed optimizer, the second with a plain one
# In which order a stage of megatron-core names its parameters, and so its optimizer numbers them.
_ORDER = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


@dataclass(frozen=True)
class ReshardResult:
    """iteration: the name of what was written; with_optimizer: whether its optimizer state is there."""

    iteration: str
    with_optimizer: bool


def reshard(
    checkpoint: str | Path,
    target: str | Path,
    *,
    tp: int,
    pp: int,
    with_optimizer: bool = True,
    options: ForeignOptions | None = None,
    progress: Progress | None = None,
) -> ReshardResult:
    """Write `checkpoint` (ours, or another program's) as tp x pp per-rank files into the new directory `target`.

    Memory: one rank's file. Optimizer state comes from sharded checkpoints of ours, as far as they hold it. Raises
    UserError when the model does not divide, the checkpoint is not intact, or `target` exists and is not empty;
    nothing is left behind then.
    """
    source, hf_files, step = _open(Path(checkpoint), options)
    model = source.model
    _check_layout(model, tp, pp)
    args = megatron_args(model, tp=tp, pp=pp, iteration=step)
    optimizer = None
    if with_optimizer and isinstance(source, MegatronSource):
        optimizer = _Optimizer.open(source, Path(checkpoint))
    require_absent(target, checkpoint)
    iteration = f"iter_{step:07d}" if step else "release"
    places = [(rank, stage) for rank in range(tp) for stage in range(pp)]
    num_bytes = sum(_part_num_bytes(source, spec) for spec in tensor_specs(model))
    num_bytes += optimizer.num_bytes if optimizer else 0
    plans = [PlannedFile(_file_name(iteration, *place, pp), (), num_bytes // len(places)) for place in places]
    identity = {"to": "megatron-ranks", "tp": tp, "pp": pp, "source": str(Path(checkpoint).resolve())}
    with workspace(target, plans, identity, Alone()) as work:
        for plan, (rank, stage) in zip(plans, places, strict=True):
            content = _rank_content(source, optimizer, args, step, rank=rank, tp=tp, stage=stage, pp=pp)
            path = work.directory / plan.name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
            if progress is not None:
                progress(plan.name, plan.num_bytes, num_bytes)
        if hf_files is not None:
            read_generation_config(hf_files)
            copy_tokenizer(hf_files, work.directory)
        (work.directory / TRACKER).write_text(str(step) if step else "release", encoding="utf-8")
        publish(work, target, {}, {"source": {"directory": Path(checkpoint).resolve().name}})
    return ReshardResult(iteration, optimizer is not None)


def megatron_args(model: ModelConfig, *, tp: int, pp: int, iteration: int) -> argparse.Namespace:
    """The arguments under which Megatron-LM builds the model. UserError for what it has no argument for."""
    rope = model.rope
    if rope.kind == "dynamic":
        raise UserError("Megatron-LM has no argument for RoPE scaling 'dynamic', so its files cannot say it.")
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if rope.kind == "llama3" and any(getattr(rope, name) != value for name, value in fixed.items()):
        raise UserError(f"Megatron-LM knows Llama 3's RoPE scaling with {fixed} only, not {rope!r}.")
    window = None if model.sliding_window is None else (model.sliding_window - 1, 0)
    layers = [int(model.has_window(layer)) for layer in range(model.num_layers)]
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        group_query_attention=model.num_kv_heads != model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=model.max_position_embeddings,
        normalization="RMSNorm",
        norm_epsilon=model.rms_norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=model.has_qkv_bias,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=rope.factor if rope.kind == "linear" else None,
        use_rope_scaling=rope.kind == "llama3",
        rope_scaling_factor=rope.factor if rope.kind == "llama3" else 8.0,
        window_size=window,
        window_attn_skip_freq=layers if model.num_full_attention_layers and window else None,
        init_method_std=model.initializer_range,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size(tp),
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        transformer_impl="local",
        ckpt_format="torch",
        params_dtype=getattr(torch, model.dtype),
        iteration=iteration,
    )


def _open(
    checkpoint: Path, options: ForeignOptions | None
) -> tuple[MegatronSource | ForeignSource, Path | None, int]:
    """(source, where its tokenizer lies, step)"""
    if is_foreign_directory(checkpoint):
        foreign = ForeignSource(checkpoint, options)
        step = foreign.iteration if isinstance(foreign.iteration, int) else 0
        return foreign, foreign.tokenizer, step
    source = MegatronSource(checkpoint)
    require_intact(checkpoint)
    return source, checkpoint / HF_SUBDIRECTORY, int(source.meta.get("step") or 0)


def _check_layout(model: ModelConfig, tp: int, pp: int) -> None:
    for what, number, size in (
        ("layers", model.num_layers, pp),
        ("KV heads", model.num_kv_heads, tp),
        ("feed-forward channels", model.intermediate_size, tp),
    ):
        if size < 1 or number % size:
            raise UserError(
                f"{number} {what} cannot be split over {size} ranks. Choose another --tp or --pp."
            )


class _Optimizer:
    """Adam's state in a sharded checkpoint of ours, and its parameter groups: with weight decay, and without."""

    def __init__(self, source: MegatronSource, groups: list[dict[str, Any]]) -> None:
        self._source = source
        stored = set(source.all_names)
        self._master = next(
            (name for name in _MASTERS if f"optimizer.state.{name}.{_EMBEDDING}" in stored), None
        )
        self.groups = sorted(groups, key=lambda group: group.get("wd_mult", 1.0) == 0.0)

    @classmethod
    def open(cls, source: MegatronSource, checkpoint: Path) -> _Optimizer | None:
        """None when the checkpoint holds no optimizer state."""
        if f"optimizer.state.exp_avg.{_EMBEDDING}" not in source.all_names:
            return None
        found = load_common(checkpoint).content.get("optimizer")
        while isinstance(found, Mapping) and "param_groups" not in found:
            found = found.get("optimizer")
        groups = list(found["param_groups"]) if isinstance(found, Mapping) else []
        if len(groups) != 2:
            raise UserError(
                f"{checkpoint}: common.pt holds {len(groups)} parameter groups of the optimizer, 2 are expected. "
                "Leave the optimizer out with --no-optimizer."
            )
        return cls(source, groups)

    @property
    def num_bytes(self) -> int:
        names = [name for name in self._source.all_names if name.startswith("optimizer.")]
        return sum(math.prod(self._source.shape(n)) * self._source.dtype(n).itemsize for n in names)

    def moment(self, kind: str, name: str, rows: Range | None = None) -> torch.Tensor:
        return self._source.read(f"optimizer.state.{kind}.{name}", rows)

    def master(self, name: str, rows: Range | None = None) -> torch.Tensor:
        if self._master is None:
            raise UserError(f"{self._source.directory}: no fp32 weights of the optimizer for {name}.")
        return self.moment(self._master, name, rows)


_EMBEDDING = "embedding.word_embeddings.weight"


def _rank_content(
    source: MegatronSource | ForeignSource,
    optimizer: _Optimizer | None,
    args: argparse.Namespace,
    step: int,
    *,
    rank: int,
    tp: int,
    stage: int,
    pp: int,
) -> dict[str, Any]:
    """What one rank's file holds."""
    model, shape = source.model, _Shard(rank, tp, source.model.padded_vocab_size(tp))
    specs = dict(_stage_specs(model, stage, pp))
    content: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "model": {local: shape.cut(spec, _reader(source.read, spec.name)) for local, spec in specs.items()},
    }
    if optimizer is not None:
        content["optimizer"] = _optimizer_content(
            optimizer, specs, shape, bf16=args.params_dtype != torch.float32
        )
    return content


def _optimizer_content(
    optimizer: _Optimizer, specs: Mapping[str, TensorSpec], shard: _Shard, *, bf16: bool
) -> dict[str, Any]:
    ordered = sorted(specs, key=_parameter_order)
    groups = [
        [n for n in ordered if not n.endswith(_WITHOUT_DECAY)],
        [n for n in ordered if n.endswith(_WITHOUT_DECAY)],
    ]
    state: dict[int, dict[str, torch.Tensor]] = {}
    param_groups, masters = [], []
    for settings, names in zip(optimizer.groups, groups, strict=True):
        numbers = list(range(len(state), len(state) + len(names)))
        for number, local in zip(numbers, names, strict=True):
            spec = specs[local]
            state[number] = {
                kind: shard.cut(spec, _reader(optimizer.moment, kind, spec.name)) for kind in _MOMENTS
            }
        param_groups.append({**settings, "params": numbers})
        masters.append(
            [shard.cut(specs[n], _reader(optimizer.master, specs[n].name)) for n in names] if bf16 else []
        )
    adam = {"state": state, "param_groups": param_groups}
    return {"optimizer": adam, "fp32_from_fp16_params": masters} if bf16 else adam


_WITHOUT_DECAY = ("norm.weight", ".bias")


def _reader(read: Callable[..., torch.Tensor], *names: str) -> Callable[[Range | None], torch.Tensor]:
    return lambda rows: read(*names, rows)


@dataclass(frozen=True)
class _Shard:
    """The part of a tensor-parallel rank."""

    rank: int
    tp: int
    padded_vocab_size: int

    def cut(self, spec: TensorSpec, read: Callable[[Range | None], torch.Tensor]) -> torch.Tensor:
        """Of the whole sharded tensor that `read` gives rows of."""
        if spec.kind == "vocab":
            height = self.padded_vocab_size // self.tp
            start, stop = (min(row, spec.shape[0]) for row in (self.rank * height, (self.rank + 1) * height))
            real = read((start, stop))
            return torch.cat([real, real.new_zeros(height - (stop - start), *spec.shape[1:])])
        if spec.tp_dim is None:
            return read(None)
        if spec.tp_dim == 1:
            return read(None).chunk(self.tp, dim=1)[self.rank].clone()
        if spec.kind == "gate_up":
            half = spec.shape[0] // 2
            return torch.cat([read(self._rows(half, first)) for first in (0, half)])
        return read(self._rows(spec.shape[0], 0))

    def _rows(self, num_rows: int, first: int) -> Range:
        height = num_rows // self.tp
        return first + self.rank * height, first + (self.rank + 1) * height


def _stage_specs(model: ModelConfig, stage: int, pp: int) -> Iterator[tuple[str, TensorSpec]]:
    """(name in the stage, spec), layers numbered from 0."""
    per_stage = model.num_layers // pp
    for spec in tensor_specs(model):
        if spec.layer is not None:
            if spec.layer // per_stage == stage:
                old, new = f"layers.{spec.layer}.", f"layers.{spec.layer % per_stage}."
                yield spec.name.replace(old, new), spec
        elif spec.name == _EMBEDDING:
            if stage == 0:
                yield spec.name, spec
            if model.tie_embeddings and pp > 1 and stage == pp - 1:
                yield "output_layer.weight", spec  # the last stage's copy
        elif stage == pp - 1:
            yield spec.name, spec


def _parameter_order(name: str) -> tuple[int, int, int]:
    """(part of the model, layer, place in the layer)"""
    _, layers, rest = name.partition("decoder.layers.")
    if not layers:
        return ({"embedding": 0, "decoder": 2, "output_layer": 3}[name.split(".")[0]], 0, 0)
    number, _, rest = rest.partition(".")
    return 1, int(number), _ORDER.index(rest)


def _part_num_bytes(source: MegatronSource | ForeignSource, spec: TensorSpec) -> int:
    shape: Shape = source.shape(spec.name)
    return math.prod(shape) * source.dtype(spec.name).itemsize


def _file_name(iteration: str, rank: int, stage: int, pp: int) -> str:
    directory = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    return f"{iteration}/{directory}/model_optim_rng.pt"
