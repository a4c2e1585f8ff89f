"""A model spread over the ranks of this job, to be asked and not trained: neither gradients nor optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from meditron_train.checkpoint.adapters import is_adapter_directory
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY
from meditron_train.checkpoint.hf.read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.sharded.ranks import STATE_METADATA, load_sharded, without_extra_state
from meditron_train.checkpoint.sharded.read import ShardedSource, is_sharded_directory
from meditron_train.checkpoint.tensor_map import TensorSource, fill_parameters
from meditron_train.config.check import split_problems
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.training import ParallelSection
from meditron_train.errors import UserError
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.layout import ParallelLayout
from meditron_train.model import LlamaModel, ModelOnRanks, build_chunk, global_names, transformer_config
from meditron_train.parallel import Mesh, initialize


@dataclass(frozen=True)
class ParallelModel:
    """A model on the ranks, and the directory of its tokenizer."""

    mesh: Mesh
    on_ranks: ModelOnRanks
    tokenizer: Path


def open_parallel_model(
    directory: Path,
    launch: LaunchEnvironment,
    parallel: ParallelSection,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
) -> ParallelModel:
    """Load a Hugging Face directory or a sharded checkpoint, each rank its own part; collective.

    Args:
        directory: of the model.
        launch: this process's place among the ranks.
        parallel: sizes of the parallel dimensions; what is left of the ranks shares the questions.
        dtype: of the weights and activations.
        device: auto, cpu or cuda.

    Raises:
        UserError: it is no such directory, is damaged, or the layout does not fit the ranks or the model.
    """
    if is_adapter_directory(directory):
        raise UserError(
            f"{directory} is an adapter, which the parallel runner does not add to a base: merge it first "
            f"(meditron-train convert merge-adapter BASE {directory} OUT), or use --runner transformers"
        )
    layout = parallel.layout(launch.world_size)
    is_sharded = is_sharded_directory(directory)
    source: TensorSource | None = None
    if is_sharded:
        require_intact(directory, check_hashes=False)
        model, tokenizer = ShardedSource(directory).model, directory / HF_SUBDIRECTORY
    elif is_hf_directory(directory):
        model, source = open_hf_model(directory)
        tokenizer = directory
    else:
        raise UserError(f"{directory} is neither a Hugging Face model nor a sharded checkpoint")
    if problems := layout.problems() or split_problems(model, layout):
        raise UserError(f"{directory} on {launch.world_size} ranks: " + "; ".join(problems))
    if launch.world_size > 1:
        os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port))
    mesh = initialize(
        layout,
        rank=launch.rank,
        local_rank=launch.local_rank,
        one_gpu_per_task=launch.kind == "slurm",
        device=device,
    )
    padded_vocab_size = model.padded_vocab_size(layout.tensor, parallel.vocab_multiple)
    chunks = _build(model, mesh, padded_vocab_size, dtype)
    if source is None:
        _load_sharded(chunks, directory)
    else:
        _load_hf(chunks, model, mesh, source, padded_vocab_size)
    on_ranks = ModelOnRanks(model, tuple(chunks), layout, mesh.at, mesh.groups, mesh.device)
    return ParallelModel(mesh, on_ranks, tokenizer)


def _build(model: ModelConfig, mesh: Mesh, padded_vocab_size: int, dtype: torch.dtype) -> list[LlamaModel]:
    layout: ParallelLayout = mesh.layout
    config = transformer_config(model, layout, dtype=dtype, on_gpu=mesh.on_gpu)
    return [
        build_chunk(
            config,
            model,
            layout,
            mesh.groups,
            pipeline_rank=mesh.at.pipeline,
            virtual_rank=virtual_rank,
            padded_vocab_size=padded_vocab_size,
        ).to(mesh.device)
        for virtual_rank in range(layout.virtual_pipeline)
    ]


def _load_hf(
    chunks: list[LlamaModel], model: ModelConfig, mesh: Mesh, source: TensorSource, padded_vocab_size: int
) -> None:
    for virtual_rank, chunk in enumerate(chunks):
        first_layer = mesh.layout.layers_of(mesh.at.pipeline, virtual_rank, model.num_layers).start
        parameters = dict(chunk.named_parameters())
        fill_parameters(
            {name: parameters[local] for local, name in global_names(chunk, first_layer).items()},
            model,
            source,
            tp_rank=mesh.at.tensor,
            tp_size=mesh.layout.tensor,
            padded_vocab_size=padded_vocab_size,
        )


def _load_sharded(chunks: list[LlamaModel], directory: Path) -> None:
    wanted = {
        f"model{virtual_rank}": without_extra_state(chunk.sharded_state_dict(metadata=STATE_METADATA))
        for virtual_rank, chunk in enumerate(chunks)
    }
    loaded = load_sharded(wanted, directory)
    for virtual_rank, chunk in enumerate(chunks):
        chunk.load_state_dict(
            loaded[f"model{virtual_rank}"], strict=False
        )  # all but the extra state, which is empty
