"""From a Hugging Face directory to a sharded checkpoint, by blocks of rows, without building the model: ours, or what
Megatron-LM's own GPTModel loads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.convert.engine import (
    NO_LIMITS,
    Limits,
    Progress,
    convert_files,
    describe_conversion,
    describe_hf_files,
)
from meditron_train.checkpoint.convert.source_files import SourceFiles, files_identity
from meditron_train.checkpoint.convert.workspace import Ranks, require_absent
from meditron_train.checkpoint.dtypes import common_dtype, dtype_name, parse_dtype, require_convertible
from meditron_train.checkpoint.hf.directory import (
    HF_SUBDIRECTORY,
    copy_generation_config,
    read_generation_config,
    write_hf_files,
)
from meditron_train.checkpoint.hf.read import HFSource, open_hf_model
from meditron_train.checkpoint.manifest import TensorEntry, read_tensor_hashes
from meditron_train.checkpoint.megatron.args import args_of_model
from meditron_train.checkpoint.megatron.source import TRACKER
from meditron_train.checkpoint.planned import PlannedFile, PlannedTensor, Stack
from meditron_train.checkpoint.sharded.plan import meta_json, plan_distcp, write_index
from meditron_train.checkpoint.tensor_map import TensorSpec, sharded_pieces, tensor_specs
from meditron_train.checkpoint.tokenizer.beside_model import check_tokenizer, copy_tokenizer
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

_RELEASE = "release"  # Megatron-LM's word for a checkpoint of weights alone, which begins at iteration 0
# In both of Megatron-LM's layer specifications, local and Transformer Engine, a norm goes by the linear layer behind
# it, and each linear layer has an `_extra_state`: nothing in the first, FP8 scales or None in the second.
_THEIR_NAMES = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def hf_to_sharded(
    hf_directory: str | Path,
    checkpoint: str | Path,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model of a Hugging Face directory as a sharded checkpoint that any parallel layout can load.

    Memory: blocks of a few MiB. An interrupted call is continued by the next one with the same arguments.

    Args:
        hf_directory: the model.
        checkpoint: directory to create.
        dtype: "bf16", "fp16", "fp32", or None / "keep" for each tensor's own.
        vocab_multiple: the embedding is padded with zero rows to a multiple of it.
        limits, ranks, progress: as for `convert_files`.

    Raises:
        UserError: the model is not supported, is damaged, or has weights that are not finite, or the output
            exists and is not empty. Nothing is left behind then.
    """
    job = _Job.open(hf_directory, checkpoint, dtype, vocab_multiple)
    files = plan_distcp(job.tensors)

    def complete(directory: Path) -> dict[str, Any]:
        write_index(directory, files)
        meta = json.dumps(meta_json(job.model, job.padded_vocab_size), indent=2) + "\n"
        (directory / "meta.json").write_text(meta, encoding="utf-8")
        (directory / HF_SUBDIRECTORY).mkdir(exist_ok=True)
        write_hf_files(directory / HF_SUBDIRECTORY, job.model, job.source.directory)
        return describe_hf_files(directory / HF_SUBDIRECTORY)

    job.run(checkpoint, files, "sharded", complete, limits, ranks, progress)


def hf_to_megatron_lm(
    hf_directory: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    limits: Limits = NO_LIMITS,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model of a Hugging Face directory as what Megatron-LM's `--load` takes, in `torch_dist`:

        TARGET/latest_checkpointed_iteration.txt, release/, and the tokenizer

    with its names, one tensor for all layers, for any layout of its ranks.

    Args:
        hf_directory: the model.
        target: directory to create.
        dtype, limits, ranks, progress: as for `hf_to_sharded`.

    Raises:
        UserError: as `hf_to_sharded`, and for a RoPE that Megatron-LM has no argument for.
    """
    job = _Job.open(hf_directory, target, dtype, vocab_multiple=128)
    args = args_of_model(job.model)
    args.ckpt_format = "torch_dist"
    read_generation_config(job.source.directory)
    files = [
        replace(file, name=f"{_RELEASE}/{file.name}")
        for file in plan_distcp(_stacked(job.specs, job.tensors, job.model.num_layers))
    ]

    def complete(directory: Path) -> dict[str, Any]:
        common = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        }
        write_index(directory / _RELEASE, files, common=common, objects=_extra_states(job.model.num_layers))
        copy_tokenizer(job.source.directory, directory)
        copy_generation_config(job.source.directory, directory)
        (directory / TRACKER).write_text(_RELEASE, encoding="utf-8")
        return describe_hf_files(directory)

    job.run(target, files, "megatron-lm", complete, limits, ranks, progress)


@dataclass(frozen=True)
class _Job:
    """What is converted, and to which tensors.

    Attributes:
        tensors: one of `specs` each, in their order.
    """

    model: ModelConfig
    source: HFSource
    inputs: SourceFiles
    specs: Sequence[TensorSpec]
    tensors: Sequence[PlannedTensor]
    padded_vocab_size: int
    dtype: str
    cast: torch.dtype | None

    @classmethod
    def open(
        cls, hf_directory: str | Path, target: str | Path, dtype: str | None, vocab_multiple: int
    ) -> _Job:
        cast = parse_dtype(dtype)
        require_absent(target, hf_directory)
        inputs = SourceFiles(Path(hf_directory))
        model, source = open_hf_model(hf_directory, read_once=True)
        check_tokenizer(source.directory, model.vocab_size)
        padded_vocab_size = model.padded_vocab_size(tp=1, multiple=vocab_multiple)
        specs = tensor_specs(model)
        for name in (name for spec in specs for name in spec.hf_names):
            require_convertible(name, source.dtype(name), cast)
        tensors = [
            PlannedTensor(
                spec.name,
                cast or _dtype_of(spec, source),
                spec.padded_shape(padded_vocab_size),
                tuple(sharded_pieces(spec, padded_vocab_size)),
            )
            for spec in specs
        ]
        model = model.model_copy(update={"dtype": common_dtype([tensor.dtype for tensor in tensors])})
        return cls(model, source, inputs, specs, tensors, padded_vocab_size, dtype or "keep", cast)

    def run(
        self,
        target: str | Path,
        files: Sequence[PlannedFile],
        kind: str,
        complete: Callable[[Path], dict[str, Any]],
        limits: Limits,
        ranks: Ranks | None,
        progress: Progress | None,
    ) -> None:
        directory = self.source.directory
        convert_files(
            target,
            files,
            self.source,
            self.inputs,
            identity={"to": kind, "dtype": self.dtype, "source": files_identity(directory)},
            complete=complete,
            manifest=describe_conversion(directory, self.model, self.cast, format="hugging-face"),
            entries={
                name: TensorEntry(dtype_name(tensor.dtype), shape)
                for spec, tensor in zip(self.specs, self.tensors, strict=True)
                for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
            },
            expected=read_tensor_hashes(directory),  # where an earlier conversion has left them
            limits=limits,
            ranks=ranks,
            progress=progress,
        )


def _stacked(
    specs: Sequence[TensorSpec], tensors: Sequence[PlannedTensor], num_layers: int
) -> list[PlannedTensor]:
    """The tensors of the layers as parts of one tensor for all of them, under Megatron-LM's names."""
    found = []
    for spec, tensor in zip(specs, tensors, strict=True):
        if spec.layer is not None:
            name = spec.name.replace(f".{spec.layer}.", ".", 1)
            for ours, theirs in _THEIR_NAMES:
                name = name.replace(ours, theirs)
            tensor = replace(tensor, part_of=Stack(name, num_layers, spec.layer))
        found.append(tensor)
    return found


def _extra_states(num_layers: int) -> dict[str, bytes]:
    """Name -> record of the `_extra_state` of every linear layer: a list with the one object that it is."""
    record = io.BytesIO()
    torch.save([None], record)
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{num_layers}": record.getvalue()
        for linear in _LINEARS
        for layer in range(num_layers)
    }


def _dtype_of(spec: TensorSpec, source: HFSource) -> torch.dtype:
    dtypes = {source.dtype(name) for name in spec.hf_names}
    if len(dtypes) > 1:
        raise UserError(
            f"{', '.join(spec.hf_names)} have different dtypes and become one tensor: choose one with --dtype"
        )
    return dtypes.pop()
