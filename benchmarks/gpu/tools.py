"""The tools that `train_step` compares on one GPU. Each is built from the same weights and leaves nothing behind.

- transformers, autocast: fp32 weights, bf16 autocast, torch's fused AdamW. As ours, it keeps fp32 weights.
- transformers, compiled: the same with every layer compiled by torch.compile (on a CPU with the backend aot_eager,
  which compiles nothing: a toy only shows that it runs).
- transformers, FSDP2: fp32 weights sharded over the one rank by torch's fully_shard, layer by layer; compute in bf16.
- transformers, bf16: weights, gradients and optimizer in bf16. Less memory and less work, but small updates are lost.
- meditron-train: bf16 weights with fp32 masters, fp32 gradients, packed documents. One process, no parallelism.
- meditron-train, short documents: the same step and as many tokens, but in documents of log-normal length (mean 350);
  what it does not attend to costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM

from benchmarks.gpu.attention import lognormal_lengths
from benchmarks.peers import Step, Workload, engine_step, plain_step
from meditron_train.data.packed import PackedBatch
from meditron_train.layout import ParallelLayout
from meditron_train.parallel import destroy, initialize

BASELINE, OURS, SHORT_DOCUMENTS = (
    "transformers, autocast",
    "meditron-train",
    "meditron-train, short documents",
)
Tool = Callable[[Workload, LlamaForCausalLM, str], contextlib.AbstractContextManager[Step]]
"""Builds the step on a device (cuda or cpu) from the weights of a model on the CPU."""


def copy_to(device: str, model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model on the device in `dtype`, for training; no second copy on the CPU."""
    with torch.device(device):
        copy = LlamaForCausalLM(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    return copy.train()


@contextlib.contextmanager
def autocast(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    yield plain_step(work, copy_to(device, model, torch.float32), device, autocast=True)


@contextlib.contextmanager
def bf16(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    yield plain_step(work, copy_to(device, model, torch.bfloat16), device, autocast=False)


@contextlib.contextmanager
def compiled(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    on_device = copy_to(device, model, torch.float32)
    for layer in on_device.model.layers:
        layer.compile(backend="inductor" if device == "cuda" else "aot_eager")
    try:
        yield plain_step(work, on_device, device, autocast=True)
    finally:
        torch.compiler.reset()


@contextlib.contextmanager
def fsdp2(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    initialize(ParallelLayout(world_size=1), rank=0, local_rank=0, device=device)
    try:
        on_device = copy_to(device, model, torch.float32)
        mesh = init_device_mesh(device, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in on_device.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(on_device, mesh=mesh, mp_policy=policy)
        yield plain_step(work, on_device, device, autocast=False)
    finally:
        destroy()


@contextlib.contextmanager
def ours(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    try:
        yield engine_step(work, model, device)
    finally:
        destroy()


@contextlib.contextmanager
def ours_with_short_documents(work: Workload, model: LlamaForCausalLM, device: str) -> Iterator[Step]:
    try:
        yield engine_step(work, model, device, [short_documents(tokens_BS) for tokens_BS in work.batches])
    finally:
        destroy()


def short_documents(tokens_BS: torch.Tensor) -> PackedBatch:
    """The same tokens as documents of log-normal length; the last token of each has no label."""
    lengths = lognormal_lengths(tokens_BS.numel())
    ends = torch.tensor(list(accumulate(lengths)))
    tokens_T = tokens_BS.reshape(-1)
    labels_T, mask_T = tokens_T.roll(-1), torch.ones(len(tokens_T))
    labels_T[ends - 1] = 0
    mask_T[ends - 1] = 0
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=mask_T,
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
    )


# Ours first: what is stopped keeps what it has measured.
TOOLS: dict[str, Tool] = {
    OURS: ours,
    SHORT_DOCUMENTS: ours_with_short_documents,
    BASELINE: autocast,
    "transformers, compiled": compiled,
    "transformers, FSDP2": fsdp2,
    "transformers, bf16": bf16,
}
