"""Load through megatron-core, with every byte of the checkpoint read by what the caller gives.

By itself megatron-core opens `.metadata` with `pickle.load` and objects with `torch.load(weights_only=False)`, which
run what the files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader


def load_with_reader(
    state: dict[str, Any], directory: Path, reader: FileSystemReader, common: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """Fill `state` from a checkpoint; collective.

    Args:
        state: sharded tensors and objects to fill.
        directory: of the checkpoint.
        reader: reads metadata, tensors and objects.
        common: the content of common.pt.

    Returns:
        What was loaded, and the keys that the checkpoint lacks.

    Raises:
        CheckpointException: torch's (not an Exception), with what `reader` raised on any rank.
        CheckpointingException: megatron-core's, for tensors of another shape.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
    from megatron.core.dist_checkpointing.validation import StrictHandling

    class GivenCommonState(LoadCommonStrategy):
        def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
            return dict(common)

        def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
            raise NotImplementedError("objects come from the reader, with the tensors")

        def check_backend_compatibility(self, loaded_backend: Any) -> None:
            pass

        def check_version_compatibility(self, loaded_version: Any) -> None:
            pass

    # The strategy makes its readers by this function and takes none from outside.
    make_reader = torch_strategies._get_filesystem_reader
    torch_strategies._get_filesystem_reader = lambda *_args, **_kwargs: reader
    try:
        # megatron-core calls "unexpected" what is asked for and absent, "missing" what is stored and not asked for.
        loaded, _, absent = dist_checkpointing.load(
            state,
            str(directory),
            sharded_strategy=torch_strategies.TorchDistLoadShardedStrategy(),
            common_strategy=GivenCommonState(),
            strict=StrictHandling.RETURN_ALL,
        )
    finally:
        torch_strategies._get_filesystem_reader = make_reader
    return loaded, absent
