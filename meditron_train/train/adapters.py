"""How low-rank adapters start, and what their dropout depends on: the same in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import count

import torch
import torch.distributed as dist

from meditron_train.config.schema import Config
from meditron_train.layout import split_dim
from meditron_train.model.lora import initial_adapter
from meditron_train.parallel import Mesh


@torch.no_grad()
def start_adapters(
    chunk: torch.nn.Module, names: Mapping[str, str], seed: int, group: dist.ProcessGroup
) -> None:
    """Fill the adapters of a chunk as `initial_adapter` says; each rank makes a whole A and keeps its columns.

    Args:
        chunk: the model's part on this rank.
        names: of its parameters -> in the whole model.
        seed: `train.seed`.
        group: the tensor-parallel ranks.
    """
    for local, parameter in chunk.named_parameters():
        name = names[local]
        if name.endswith("_lora_B"):
            parameter.zero_()
        elif name.endswith("_lora_A"):
            rank, num_inputs = parameter.shape
            if split_dim(name) is None:
                parameter.copy_(initial_adapter(name, rank, num_inputs, seed))
            else:
                whole = initial_adapter(name, rank, num_inputs * group.size(), seed)
                parameter.copy_(whole.chunk(group.size(), dim=1)[group.rank()])


def dropout_seeds(config: Config, mesh: Mesh, step: int) -> Iterator[int | None]:
    """For this rank's micro-batches of a step, one after the other; None where nothing is dropped.

    Micro-batches are dealt to the data-parallel ranks in turn: their numbers do not depend on the layout.
    """
    drops = config.lora is not None and config.lora.dropout > 0
    for number in count(mesh.at.data, mesh.layout.data):
        digest = hashlib.sha256(f"{config.train.seed}/{step}/{number}".encode()).digest()
        yield int.from_bytes(digest[:8], "little") if drops else None
