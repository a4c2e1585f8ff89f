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
from pydantic import ValidationError

from meditron_train.checkpoint.convert.source_files import SourceFiles, open_megatron
from meditron_train.checkpoint.convert.workspace import Alone, publish, require_absent, workspace
from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.directory import (
    HF_SUBDIRECTORY,
    copy_generation_config,
    read_generation_config,
)
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.megatron.args import args_of_model
from meditron_train.checkpoint.megatron.source import (
    TRACKER,
    MegatronOptions,
    MegatronSource,
    is_megatron_directory,
)
from meditron_train.checkpoint.megatron.torch_dist import load_common
from meditron_train.checkpoint.planned import PlannedFile
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.checkpoint.tensor_map import TensorSpec, tensor_specs
from meditron_train.checkpoint.tokenizer.beside_model import copy_tokenizer
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

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
    """What was written.

    Attributes:
        iteration: its name.
        with_optimizer: whether the optimizer state is there.
    """

    iteration: str
    with_optimizer: bool


def reshard(
    checkpoint: str | Path,
    target: str | Path,
    *,
    tp: int,
    pp: int,
    with_optimizer: bool = True,
    options: MegatronOptions | None = None,
    progress: Progress | None = None,
) -> ReshardResult:
    """Write `checkpoint` (ours, or another program's) as tp x pp per-rank files into the new directory `target`.

    Memory: one rank's file. Optimizer state comes from sharded checkpoints of ours, as far as they hold it.

    Raises:
        UserError: the model does not divide, the checkpoint is not intact, or `target` exists and is not
            empty. Nothing is left behind then.
    """
    inputs, source, hf_files, step = _open(Path(checkpoint), options)
    model = source.model
    _check_layout(model, tp, pp)
    args = args_of_model(model, tp=tp, pp=pp)
    args.ckpt_format, args.transformer_impl, args.iteration = "torch", "local", step
    optimizer = None
    if with_optimizer and isinstance(source, ShardedSource):
        optimizer = _Optimizer.open(source, Path(checkpoint))
    require_absent(target, checkpoint, *((options.tokenizer, options.config) if options else ()))
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
            copy_generation_config(hf_files, work.directory)
        (work.directory / TRACKER).write_text(str(step) if step else "release", encoding="utf-8")
        inputs.require_unchanged()
        publish(work, target, {}, {"source": {"directory": Path(checkpoint).resolve().name}})
    return ReshardResult(iteration, optimizer is not None)


def _open(
    checkpoint: Path, options: MegatronOptions | None
) -> tuple[SourceFiles, ShardedSource | MegatronSource, Path | None, int]:
    """(files that are read, source, where its tokenizer lies, step)"""
    if is_megatron_directory(checkpoint):
        inputs, megatron = open_megatron(checkpoint, options or MegatronOptions())
        return inputs, megatron, megatron.tokenizer, megatron.iteration or 0
    inputs = SourceFiles(checkpoint)
    source = ShardedSource(checkpoint)
    require_intact(checkpoint)
    return inputs, source, checkpoint / HF_SUBDIRECTORY, int(source.meta.get("step") or 0)


def _check_layout(model: ModelConfig, tp: int, pp: int) -> None:
    for what, number, size in (
        ("layers", model.num_layers, pp),
        ("KV heads", model.num_kv_heads, tp),
        ("feed-forward channels", model.intermediate_size, tp),
    ):
        if size < 1 or number % size:
            raise UserError(f"{number} {what} cannot be split over {size} ranks. Choose another --tp or --pp")


class _Optimizer:
    """Adam's state in a sharded checkpoint of ours, and its parameter groups: with weight decay, and without.

    schedule: the state of Megatron-LM's learning-rate schedule, None where the checkpoint does not hold its settings.
    """

    def __init__(self, source: ShardedSource, groups: list[dict[str, Any]]) -> None:
        self._source = source
        self.schedule = _schedule(source.meta)
        stored = set(source.all_names)
        self._master = next(
            (name for name in _MASTERS if f"optimizer.state.{name}.{_EMBEDDING}" in stored), None
        )
        self.groups = sorted(groups, key=lambda group: group.get("wd_mult", 1.0) == 0.0)

    @classmethod
    def open(cls, source: ShardedSource, checkpoint: Path) -> _Optimizer | None:
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
                "Leave the optimizer out with --no-optimizer"
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
            raise UserError(f"{self._source.directory}: no fp32 weights of the optimizer for {name}")
        return self.moment(self._master, name, rows)


def _schedule(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state dict of megatron-core's OptimizerParamScheduler, which counts samples where ours counts steps."""
    try:
        config = Config.model_validate(meta["config"])
        num_samples = int(meta["samples"])
    except (KeyError, TypeError, ValueError, ValidationError):
        _log.warning(
            "the checkpoint does not hold the settings of its run: no learning-rate schedule is written, without which "
            "Megatron-LM loads no optimizer state"
        )
        return None
    batch, optimizer, kind = config.train.global_batch_size, config.optimizer, config.schedule.kind
    # Our WSD ends with the run, and decay_steps is the length of its decay; Megatron-LM's has one end for both.
    last_step = config.train.steps if kind == "wsd" else config.decay_steps
    return {
        "max_lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "lr_warmup_steps": config.warmup_steps * batch,
        "lr_decay_style": "WSD" if kind == "wsd" else kind,
        "lr_decay_steps": last_step * batch,
        "num_steps": num_samples,
        "start_wd": optimizer.weight_decay,
        "end_wd": optimizer.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": config.train.steps * batch,
    }


_EMBEDDING = "embedding.word_embeddings.weight"


def _rank_content(
    source: ShardedSource | MegatronSource,
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
    model, shape = source.model, _Shard(rank, tp, args.padded_vocab_size)
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
        if optimizer.schedule is not None:
            content["opt_param_scheduler"] = optimizer.schedule
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


def _part_num_bytes(source: ShardedSource | MegatronSource, spec: TensorSpec) -> int:
    shape: Shape = source.shape(spec.name)
    return math.prod(shape) * source.dtype(spec.name).itemsize


def _file_name(iteration: str, rank: int, stage: int, pp: int) -> str:
    directory = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    return f"{iteration}/{directory}/model_optim_rng.pt"
