"""The only door to megatron-core: version check, CPU redirects, our Adam, and the names we use.

Every other module imports megatron-core's names from here, so that the redirects are in place before
`megatron.core` is first imported and an upgrade touches one file.
"""

from __future__ import annotations

import logging
import warnings
from importlib import metadata

from meditron_train.errors import UserError
from meditron_train.mcore import adam, cpu_redirects, grad_norm, lone_rank, save_errors, writer_queue
from meditron_train.mcore.bucket_padding import offsets_without_padding
from meditron_train.mcore.reading import load_with_reader
from meditron_train.mcore.save_errors import raise_save_error
from meditron_train.mcore.writer_queue import end_with_parent_only, forget_results_queue, results_queue

SUPPORTED_VERSIONS = ("0.16",)


def check_version(installed: str | None = None) -> str:
    """The installed megatron-core version (or the one given), checked.

    Raises:
        UserError: megatron-core is missing or its minor version was not tested with this package.
    """
    remedy = f"pip install 'megatron-core>={SUPPORTED_VERSIONS[0]},<0.17'"
    if installed is None:
        try:
            installed = metadata.version("megatron-core")
        except metadata.PackageNotFoundError:
            raise UserError(f"megatron-core is not installed. Write: {remedy}") from None
    if ".".join(installed.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise UserError(
            f"megatron-core {installed} is installed, but meditron-train works with "
            f"{', '.join(f'{v}.x' for v in SUPPORTED_VERSIONS)}. Write: {remedy}"
        )
    return installed


VERSION = check_version()
cpu_redirects.apply()

with warnings.catch_warnings():
    # megatron-core warns at import about each optional accelerator that is absent; `doctor` reports that better.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import (
        OptimizerConfig,
        ParamKey,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        param_is_not_tensor_parallel_duplicate,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.module import Float16Module, param_is_not_shared
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.core.transformer.utils import (
        is_layer_window_attention,
        make_sharded_tensors_for_checkpoint,
    )

adam.install()
grad_norm.install()
lone_rank.install()
save_errors.install()
writer_queue.install()

# Our MLP is a subclass of megatron-core's and gets its group from us; megatron-core knows classes by equality only.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not record.getMessage().startswith("Unknown MLP type")
)

# What megatron-core warns about at run time is its own to change: names it deprecates, torch functions that newer
# torch deprecates, GPU settings that launch/ makes.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

__all__ = [
    "MLP",
    "VERSION",
    "AsyncCallsQueue",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "FullyParallelSaveStrategyWrapper",
    "GPTModel",
    "ModuleSpec",
    "OptimizerConfig",
    "PackedSeqParams",
    "ParamKey",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "ShardedObject",
    "ShardedTensor",
    "StrictHandling",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "check_version",
    "dist_checkpointing",
    "end_with_parent_only",
    "finalize_model_grads",
    "forget_results_queue",
    "get_default_save_sharded_strategy",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "get_standard_config_overrides",
    "is_layer_window_attention",
    "load_with_reader",
    "make_sharded_tensors_for_checkpoint",
    "offsets_without_padding",
    "parallel_state",
    "param_is_not_shared",
    "param_is_not_tensor_parallel_duplicate",
    "raise_save_error",
    "results_queue",
    "set_tensor_model_parallel_attributes",
    "tensor_parallel",
]
