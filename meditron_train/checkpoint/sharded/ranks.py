"""Save and load by all ranks together, each its own part, through megatron-core's dist_checkpointing.

The files are megatron-core's `torch_dist` format; any layout loads what any other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY, write_hf_files
from meditron_train.checkpoint.sharded.checked_reader import CheckedReader, check_format, read_common
from meditron_train.checkpoint.tokenizer.chat import ChatFormat
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import MeditronError, UserError
from meditron_train.mcore import (
    AsyncCallsQueue,
    FullyParallelSaveStrategyWrapper,
    dist_checkpointing,
    get_default_save_sharded_strategy,
    load_with_reader,
    raise_save_error,
    results_queue,
)

# How megatron-core lays out state so that every layout can load it: optimizer state as whole parameters,
# and one entry per layer instead of one for all.
STATE_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drop Transformer Engine's `_extra_state` entries: empty here, and noise in a checkpoint's listing."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


class ShardedSaver:
    """Writes checkpoints of all ranks, at once or in the background; one at a time.

    Args:
        data_group: the ranks that hold the same weights; they share the writing.
        asynchronous: after the state is copied to host memory, a forked process writes while training goes on.
    """

    def __init__(self, data_group: dist.ProcessGroup, *, asynchronous: bool) -> None:
        # Its server is forked now, while this process is small: it would keep alive what the process holds at the time.
        results_queue()
        self._data_group = data_group
        self._asynchronous = asynchronous
        # The persistent worker of megatron-core hangs, or saves later weights, without CUDA: always fork.
        self._queue = AsyncCallsQueue(persistent=False) if asynchronous else None

    def save(self, state: dict[str, Any], directory: Path) -> None:
        """Write `state` into the empty `directory`; collective. Complete once `finished` says so.

        Raises:
            OSError, RuntimeError, CheckpointException (torch's): on the ranks that could not write.
        """
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist"), self._data_group, do_cache_distribution=False
        )
        request = dist_checkpointing.save(
            state,
            str(directory),
            strategy,
            async_sharded_save=self._asynchronous,
            content_metadata=dict(STATE_METADATA),
        )
        if self._queue is not None:
            self._queue.schedule_async_request(request)
        raise_save_error()

    def finished(self, *, wait: bool) -> bool:
        """Whether everything is written. Collective. With `wait`, returns only once that is so.

        Raises:
            OSError, RuntimeError, CheckpointException: as `save`.
        """
        if self._queue is None:
            return True
        self._queue.maybe_finalize_async_calls(blocking=wait)
        raise_save_error()
        return self._queue.get_num_unfinalized_calls() == 0

    def close(self) -> None:
        if self._queue is not None:
            self._queue.close()


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill `state` (sharded tensors and objects as this layout wants them) from a checkpoint; collective.

    Returns:
        What was asked for and nothing else: megatron-core adds all unsharded entries of the checkpoint, such
        as the optimizer's parameter groups, even if the caller wants the model alone.

    Raises:
        UserError: the checkpoint lacks a tensor that this model or optimizer has, is damaged, or could run
            code.
    """
    wanted = set(state)
    check_format(directory)
    try:
        loaded, absent = load_with_reader(state, directory, CheckedReader(directory), read_common(directory))
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, MeditronError)), causes[0]) from None
    if absent:
        names = sorted(absent)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"{directory} does not hold {', '.join(names[:5])}{more}: it is of another model or optimizer"
        )
    return {name: value for name, value in loaded.items() if name in wanted}


def write_companions(
    directory: Path,
    meta: Mapping[str, Any],
    model: ModelConfig,
    tokenizer_dir: Path,
    special_tokens: tuple[str, ...],
    chat: ChatFormat | None = None,
) -> None:
    """Beside the tensors: meta.json, and hf/ with config.json and tokenizer, so that it exports with nothing else."""
    hf_directory = directory / HF_SUBDIRECTORY
    hf_directory.mkdir()
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    write_hf_files(hf_directory, model, tokenizer_dir, special_tokens, chat)
