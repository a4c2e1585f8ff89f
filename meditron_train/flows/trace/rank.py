"""One rank's step on the pretended GPU, in a process of its own."""

from __future__ import annotations

import resource
import time
import warnings
from typing import Any

import torch

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.packed import PackedBatch
from meditron_train.flows.trace.device import answer_for_cuda, make_device
from meditron_train.flows.trace.recorder import Recorder, place_of
from meditron_train.flows.trace.results import RankTrace
from meditron_train.layout import ParallelLayout
from meditron_train.native.backends import choose_backend
from meditron_train.parallel import Mesh, pretend
from meditron_train.train.dry_run import invented_batch, num_micro_batches_held
from meditron_train.train.engine import DTYPES, Engine
from meditron_train.train.guard.step import StepGuard


def trace_rank(config: Config, model: ModelConfig, layout: ParallelLayout, rank: int) -> RankTrace:
    """Build the engine of `rank` and take one step with it, as many micro-batches as its pipeline holds at once.

    For a process that does nothing else. A step that fails is a finding, not an exception.
    """
    started = time.process_time()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    device = make_device()
    mesh = pretend(layout, rank, device)
    width = model.padded_vocab_size(layout.tensor, config.parallel.vocab_multiple) // layout.tensor
    is_last = mesh.at.pipeline == layout.pipeline - 1
    recorder = Recorder(_group_names(mesh), width if is_last else None)
    answer_for_cuda(recorder)
    real = config.train.global_batch_size // (config.train.micro_batch_size * layout.data)
    traced = min(
        real, max(2, num_micro_batches_held(layout))
    )  # of two, what each does can be told from the rest
    batch = invented_batch(config.train.seq_len, config.train.micro_batch_size, model.vocab_size)
    _pin(batch, recorder)
    names: list[str] = []
    num_parameters, failure = 0, None
    try:
        with recorder:
            engine = Engine(config, model, mesh, None)
            for optimizer in engine.optimizer.chained_optimizers:  # as the dry step does
                optimizer.init_state_fn(optimizer.optimizer)
            _sort_memory(engine, recorder)
            for virtual_rank in range(layout.virtual_pipeline):
                names += engine.global_names(virtual_rank).values()
            num_parameters = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
            _take_step(engine, [batch] * traced, recorder)
    except Exception as error:
        failure = f"{type(error).__name__}: {error} at {place_of(error)}"
    at = mesh.at
    return RankTrace(
        rank=rank,
        stage=at.pipeline,
        parameters=tuple(names),
        num_parameters=num_parameters,
        num_micro_batches=traced,
        real_micro_batches=real,
        attention=choose_backend(
            config.train.attention, device, DTYPES[config.train.precision], model.head_dim
        ),
        peaks=recorder.peaks(),
        collectives=recorder.collectives(),
        kernels=recorder.kernels(),
        synchronizations=recorder.waits(),
        misplaced=recorder.misplaced(),
        failure=failure,
        cpu_seconds=time.process_time() - started,
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    )


def _take_step(engine: Engine, batches: list[PackedBatch], recorder: Recorder) -> None:
    """The step as the training loop takes it; the recorder is told where one phase ends."""
    finalize, update = engine.transformer_config.finalize_model_grads_func, engine.update

    def reduce(*args: Any, **kwargs: Any) -> None:
        recorder.enter("reduction")
        finalize(*args, **kwargs)

    def change(*args: Any, **kwargs: Any) -> None:
        recorder.enter("update")
        update(*args, **kwargs)

    engine.transformer_config.finalize_model_grads_func = reduce
    engine.update = change  # type: ignore[method-assign]
    guard = StepGuard(engine, engine.config.resilience, ["host"] * engine.mesh.layout.world_size, ())
    recorder.enter("forward and backward")
    guard.take_step(1, batches, 1e-5, seconds_waited_for_data=0.0, is_saved=False)


def _sort_memory(engine: Engine, recorder: Recorder) -> None:
    """What lasts from step to step, by what it is."""
    for chunk in engine.ddp_chunks:
        for parameter in chunk.parameters():
            recorder.ledger.move(parameter.untyped_storage(), "weights")
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            recorder.ledger.move(buffer.grad_data.untyped_storage(), "gradients")
    for optimizer in engine.optimizer.chained_optimizers:
        inner = optimizer.optimizer
        weights = {p.untyped_storage()._cdata for chunk in engine.chunks for p in chunk.parameters()}
        for group in inner.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *inner.state[parameter].values()):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in weights:
                        recorder.ledger.move(tensor.untyped_storage(), "optimizer")


def _pin(batch: PackedBatch, recorder: Recorder) -> None:
    """As the loader's batches are on a GPU. The boundaries stay where they are: the host reads them."""
    for tensor in (batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.positions_T):
        recorder.pin(tensor)


def _group_names(mesh: Mesh) -> dict[str, str]:
    """Name of each process group -> what it is called in the report; of equal groups, the first counts."""
    groups = {
        "tensor": "tp",
        "pipeline": "pp",
        "context": "cp",
        "data": "dp_cp",
        "model": "mp",
        "embeddings": "embd",
    }
    names: dict[str, str] = {}
    for label, attribute in groups.items():
        group = getattr(mesh.groups, attribute, None)
        if group is not None:
            names.setdefault(group.group_name, label)
    names.setdefault(torch.distributed.group.WORLD.group_name, "world")  # type: ignore[union-attr]
    return names
