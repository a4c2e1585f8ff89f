"""Which rank holds which layers and heads, node by node."""

from __future__ import annotations

from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.layout import ParallelLayout
from meditron_train.report.page.blocks import Block, LayoutDrawing, RankBox, Section, Text
from meditron_train.report.page.training import section
from meditron_train.report.run_record import RunRecord, launch_of, listing, mapping

MOST_DRAWN_RANKS = 512
_SIZES = ("world_size", "tensor", "pipeline", "virtual_pipeline", "context")


def layout_of(run: RunRecord) -> ParallelLayout | None:
    """The layout of the last start; None where nothing says it, or what it says is impossible."""
    recorded = mapping(launch_of(run.last_provenance).get("layout")) or mapping(run.status.get("layout"))
    sizes = {name: recorded.get(name) for name in _SIZES}
    if not all(type(size) is int for size in sizes.values()):
        return None
    layout = ParallelLayout(**sizes, sequence=recorded.get("sequence") is True)  # type: ignore[arg-type]
    return None if layout.problems() else layout


def model_of(run: RunRecord) -> ModelConfig | None:
    """The shape of the model as the last start recorded it."""
    recorded = mapping(run.last_provenance.get("model"))
    fields = {name: value for name, value in recorded.items() if name in ModelConfig.model_fields}
    try:
        return ModelConfig.model_validate(fields)
    except ValueError:
        return None


def layout_section(run: RunRecord) -> Section:
    """The layout in words and as a drawing."""
    layout, model = layout_of(run), model_of(run)
    if layout is None:
        return section("layout", "Parallel layout", Text("No start recorded its layout."))
    words = (
        f"{layout.world_size:,} ranks: tensor {layout.tensor} x pipeline {layout.pipeline}"
        + (f" in {layout.virtual_pipeline} chunks" if layout.virtual_pipeline > 1 else "")
        + f" x context {layout.context} x data {layout.data}"
        + (", sequence parallelism" if layout.sequence else "")
        + "."
    )
    blocks: list[Block] = [Text(words)]
    ranks = range(layout.world_size)
    if layout.world_size > MOST_DRAWN_RANKS:
        ranks = range(MOST_DRAWN_RANKS)
        blocks.append(Text(_what_is_drawn(ranks, layout)))
    if model is None:
        blocks.append(Text("The shape of the model was not recorded, so layers and heads are not shown."))
    elif model.num_layers and layout.layer_problem(model.num_layers):
        model = None
    nodes: dict[str, list[RankBox]] = {}
    hosts = _host_of_ranks(run, layout.world_size)
    for rank in ranks:
        nodes.setdefault(hosts[rank], []).append(_box(rank, layout, model))
    blocks.append(LayoutDrawing(tuple((host, tuple(boxes)) for host, boxes in nodes.items())))
    return section("layout", "Parallel layout", *blocks)


def _what_is_drawn(ranks: range, layout: ParallelLayout) -> str:
    """Pipeline stages are the outermost: later ones have the same pattern with other layers."""
    first = f"The first {len(ranks):,} ranks are drawn"
    if layout.pipeline == 1:
        return f"{first}; the others repeat their pattern."
    last = layout.coordinates(ranks[-1]).pipeline
    is_whole = last == layout.pipeline - 1 or layout.coordinates(ranks[-1] + 1).pipeline > last
    words = f"stage {last}" if last == 0 else f"stages {_span(0, last + 1)}"
    part = "" if is_whole else f", {'a part of it' if last == 0 else 'the last in part'}"
    return (
        f"{first}: pipeline {words} of {layout.pipeline}, counted from 0{part}. The other ranks of a stage repeat its "
        "pattern; later stages hold later layers, in the same pattern."
    )


def _host_of_ranks(run: RunRecord, world_size: int) -> list[str]:
    launch = launch_of(run.last_provenance)
    recorded: list[Any] = listing(launch.get("rank_hosts"))
    if len(recorded) == world_size:
        return [str(host) for host in recorded]
    hosts = [str(host) for host in listing(run.status.get("hosts"))] or ["unknown host"]
    per_host = max(1, world_size // len(hosts))
    return [hosts[min(rank // per_host, len(hosts) - 1)] for rank in range(world_size)]


def _box(rank: int, layout: ParallelLayout, model: ModelConfig | None) -> RankBox:
    at = layout.coordinates(rank)
    lines = []
    if model is not None:
        chunks = [
            layout.layers_of(at.pipeline, chunk, model.num_layers) for chunk in range(layout.virtual_pipeline)
        ]
        lines.append("layers " + ", ".join(_span(chunk.start, chunk.stop) for chunk in chunks if len(chunk)))
        lines.append("heads " + _part(model.num_heads, at.tensor, layout.tensor))
        if model.num_kv_heads != model.num_heads:
            lines.append("KV heads " + _part(model.num_kv_heads, at.tensor, layout.tensor))
        ends = [
            name
            for name, is_here in (
                ("embedding", at.pipeline == 0),
                ("output", at.pipeline == layout.pipeline - 1),
            )
            if is_here
        ]
        lines += [f"+ {' and '.join(ends)}"] if ends else []
    sizes = (("data", at.data, layout.data), ("context", at.context, layout.context))
    lines += [f"{name} {place} of {size}" for name, place, size in sizes if size > 1]
    return RankBox(rank, at.pipeline, tuple(lines))


def _span(first: int, end: int) -> str:
    return f"{first}" if end == first + 1 else f"{first}–{end - 1}"


def _part(number: int, tensor_rank: int, tensor_size: int) -> str:
    """Which of `number` heads a tensor-parallel rank has; several ranks share one where there are fewer heads."""
    if number < tensor_size:
        return f"{tensor_rank * number // tensor_size} (shared)"
    each = number // tensor_size
    return _span(tensor_rank * each, (tensor_rank + 1) * each)
