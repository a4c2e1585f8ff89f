"""All layouts of a model on a number of GPUs: those that fit, by predicted speed, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.layout import ParallelLayout
from meditron_train.planner.hardware import Hardware
from meditron_train.planner.memory import MemoryEstimate, fullest_stage
from meditron_train.planner.throughput import StepTime, predict_step

_RECOMPUTE = ("none", "selective", "full")
_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
_LONG_SEQUENCE = 8192  # below it, splitting a sequence over ranks only adds communication


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with the settings it needs."""

    config: Config
    layout: ParallelLayout
    memory: MemoryEstimate
    step: StepTime

    def overrides(self) -> list[str]:
        """`section.field=value` for each setting that the search chooses."""
        parallel, train = self.config.parallel, self.config.train
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}",
            f"parallel.context={parallel.context}",
            f"parallel.sequence={str(parallel.sequence).lower()}",
            f"train.micro_batch_size={train.micro_batch_size}",
            f"train.recompute={train.recompute}",
        ]


@dataclass(frozen=True)
class SearchResult:
    """Layouts that were tried.

    Attributes:
        candidates: the fastest first.
        rejected: reason -> how many layouts it excludes.
    """

    candidates: list[Candidate]
    rejected: dict[str, int]


def fewest_ranks(
    config: Config, model: ModelConfig | None, numbers: Iterable[int], memory_bytes: int | None
) -> int | None:
    """The first of `numbers` of ranks that suits the config's layout and batch and, where model and memory_bytes are
    known, fits; None without one."""
    train = config.train
    for number in numbers:
        layout = config.parallel.layout(number)
        if layout.problems() or train.global_batch_size % (train.micro_batch_size * layout.data):
            continue
        if (
            model is None
            or memory_bytes is None
            or fullest_stage(config, model, layout).total <= memory_bytes
        ):
            return number
    return None


def search_layouts(config: Config, model: ModelConfig, num_gpus: int, hardware: Hardware) -> SearchResult:
    """Try every layout of `num_gpus` GPUs for the config's batch and sequence length.

    Chosen are parallel.tensor, pipeline, virtual_pipeline, context and sequence, train.micro_batch_size and
    train.recompute; the rest stays as it is. Tensor-parallel groups stay within a node. Of the recomputations, the
    cheapest that fits is kept.
    """
    rejected: Counter[str] = Counter()
    candidates = []
    for layout in _layouts(config, model, num_gpus, hardware, rejected):
        for micro_batch_size in _MICRO_BATCH_SIZES:
            if config.train.global_batch_size % (micro_batch_size * layout.data):
                rejected["the global batch is not a multiple of micro-batch x data"] += 1
                continue
            num_microbatches = config.train.global_batch_size // (micro_batch_size * layout.data)
            if layout.virtual_pipeline > 1 and num_microbatches % layout.pipeline:
                rejected["interleaving: the micro-batches are not a multiple of the stages"] += 1
                continue
            candidate = _lightest(config, model, layout, micro_batch_size, hardware)
            if candidate is None:
                rejected[f"the memory of {hardware.name}, even with full recomputation"] += 1
            else:
                candidates.append(candidate)
    candidates.sort(key=lambda candidate: -candidate.step.tokens_per_second)
    return SearchResult(candidates, dict(rejected))


def _layouts(
    config: Config, model: ModelConfig, num_gpus: int, hardware: Hardware, rejected: Counter[str]
) -> Iterator[ParallelLayout]:
    context_sizes = (
        [1, 2, 4, 8] if config.train.seq_len > _LONG_SEQUENCE or config.parallel.context > 1 else [1]
    )
    for tensor in _divisors(min(num_gpus, hardware.gpus_per_node)):
        if model.num_kv_heads % tensor or model.intermediate_size % tensor:
            rejected[f"tensor parallelism: {model.num_kv_heads} KV heads do not divide"] += 1
            continue
        for pipeline in _divisors(num_gpus // tensor):
            if pipeline > 1 and model.num_layers % pipeline:
                rejected[f"pipeline parallelism: {model.num_layers} layers do not divide"] += 1
                continue
            for context in context_sizes:
                size = tensor * pipeline * context
                if num_gpus % size:
                    rejected["the GPUs are not a multiple of tensor x pipeline x context"] += 1
                    continue
                if config.train.seq_len % (2 * context * tensor):
                    rejected["the sequence does not divide over context and tensor ranks"] += 1
                    continue
                for chunks in _divisors(model.num_layers // pipeline) if pipeline > 1 else [1]:
                    yield ParallelLayout(num_gpus, tensor, pipeline, chunks, context, sequence=tensor > 1)


def _lightest(
    config: Config, model: ModelConfig, layout: ParallelLayout, micro_batch_size: int, hardware: Hardware
) -> Candidate | None:
    """With as little recomputation as fits; None where nothing does."""
    parallel = config.parallel.model_copy(
        update={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "context": layout.context,
            "sequence": layout.sequence,
        }
    )
    for recompute in _RECOMPUTE:
        train = config.train.model_copy(update={"micro_batch_size": micro_batch_size, "recompute": recompute})
        tried = config.model_copy(update={"parallel": parallel, "train": train})
        memory = fullest_stage(tried, model, layout)
        if memory.total <= hardware.memory_bytes:
            return Candidate(tried, layout, memory, predict_step(tried, model, layout, hardware))
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
