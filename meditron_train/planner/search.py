"""All layouts of a model on a number of GPUs: those that fit, by predicted speed, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meditron_train.config.check import batch_problems, micro_batch_problem, ramp_problem, split_problems
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout
from meditron_train.planner.hardware import Hardware
from meditron_train.planner.memory import MemoryEstimate, fullest_stage
from meditron_train.planner.throughput import StepTime, predict_step

_RECOMPUTE = ("none", "selective", "full")
_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
_CONTEXT_SIZES = (1, 2, 4, 8)


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
    known, fits; None without one.

    Raises:
        UserError: the model cannot be split as the config says, on any number of ranks.
    """
    if model is not None and (problems := split_problems(model, config.parallel.layout(1))):
        raise UserError(
            "\n".join(["no number of ranks suits the configuration", *(f"  - {p}" for p in problems)])
        )
    for number in numbers:
        layout = config.parallel.layout(number)
        if layout.problems() or batch_problems(config, layout):
            continue
        if (
            model is None
            or memory_bytes is None
            or fullest_stage(config, model, layout).total <= memory_bytes
        ):
            return number
    return None


def search_layouts(
    config: Config,
    model: ModelConfig,
    num_gpus: int,
    hardware: Hardware,
    *,
    mean_document_tokens: float | None = None,
) -> SearchResult:
    """Try the layouts of `num_gpus` GPUs for the config's batch and sequence length.

    Chosen are parallel.tensor, pipeline, virtual_pipeline, context and sequence, train.micro_batch_size and
    train.recompute; the rest stays as it is. Tensor-parallel groups stay within a node, a sequence is shared by up to
    eight ranks, a micro-batch has up to 16 samples; the config's own sizes of both are tried, too. Of the
    recomputations, the cheapest that fits is kept, and of sequence parallelism what divides, on before off.

    Args:
        config, model, num_gpus, hardware: what runs on what.
        mean_document_tokens: as for `predict_step`.
    """
    rejected: Counter[str] = Counter()
    candidates = []
    micro_batch_sizes = sorted({*_MICRO_BATCH_SIZES, config.train.micro_batch_size})
    for layout in _layouts(config, model, num_gpus, hardware, rejected):
        for micro_batch_size in micro_batch_sizes:
            found = _dealt(config, layout, micro_batch_size)
            if isinstance(found, str):
                rejected[found] += 1
                continue
            candidate = _lightest(*found, model, hardware, mean_document_tokens)
            if candidate is None:
                rejected[f"the memory of {hardware.name}, even with full recomputation"] += 1
            else:
                candidates.append(candidate)
    candidates.sort(key=lambda candidate: -candidate.step.tokens_per_second)
    return SearchResult(candidates, dict(rejected))


def _layouts(
    config: Config, model: ModelConfig, num_gpus: int, hardware: Hardware, rejected: Counter[str]
) -> Iterator[ParallelLayout]:
    """Those that the model can be split into."""
    context_sizes = sorted({*_CONTEXT_SIZES, config.parallel.context})
    for tensor in _divisors(min(num_gpus, hardware.gpus_per_node)):
        if split_problems(model, ParallelLayout(num_gpus, tensor)):
            rejected[f"tensor parallelism: {model.num_kv_heads} KV heads do not divide"] += 1
            continue
        for pipeline in _divisors(num_gpus // tensor):
            if ParallelLayout(num_gpus, tensor, pipeline).layer_problem(model.num_layers):
                rejected[f"pipeline parallelism: {model.num_layers} layers are fewer than the stages"] += 1
                continue
            for context in context_sizes:
                if num_gpus % (tensor * pipeline * context):
                    rejected["the GPUs are not a multiple of tensor x pipeline x context"] += 1
                    continue
                for chunks in _divisors(model.num_layers // pipeline) if pipeline > 1 else [1]:
                    layout = ParallelLayout(num_gpus, tensor, pipeline, chunks, context)
                    if not layout.layer_problem(model.num_layers):  # an uneven pipeline has one chunk a stage
                        yield layout


def _dealt(
    config: Config, layout: ParallelLayout, micro_batch_size: int
) -> tuple[Config, ParallelLayout] | str:
    """The config in this layout, with sequence parallelism where that is possible; or why its batch cannot be dealt."""
    train = config.train.model_copy(update={"micro_batch_size": micro_batch_size})
    for sequence in (True, False) if layout.tensor > 1 else (False,):
        parallel = config.parallel.model_copy(
            update={
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual_pipeline": layout.virtual_pipeline,
                "context": layout.context,
                "sequence": sequence,
            }
        )
        tried = config.model_copy(update={"parallel": parallel, "train": train})
        layout = parallel.layout(layout.world_size)
        if micro_batch_problem(tried, layout) is None:
            break
    else:
        return "the tokens of a micro-batch do not divide over context ranks"
    if ramp := ramp_problem(tried):
        return ramp
    if batch_problems(tried, layout):
        sizes = train.batch_ramp.stages(train.global_batch_size) if train.batch_ramp else ()
        if any(size % (micro_batch_size * layout.data) for size in (*sizes, train.global_batch_size)):
            return "the global batch is not a multiple of micro-batch x data"
        return "interleaving: the micro-batches are not a multiple of the stages"
    return tried, layout


def _lightest(
    config: Config,
    layout: ParallelLayout,
    model: ModelConfig,
    hardware: Hardware,
    mean_document_tokens: float | None,
) -> Candidate | None:
    """With as little recomputation as fits; None where nothing does."""
    for recompute in _RECOMPUTE:
        train = config.train.model_copy(update={"recompute": recompute})
        tried = config.model_copy(update={"train": train})
        memory = fullest_stage(tried, model, layout)
        if memory.total <= hardware.memory_bytes:
            step = predict_step(tried, model, layout, hardware, mean_document_tokens=mean_document_tokens)
            return Candidate(tried, layout, memory, step)
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
