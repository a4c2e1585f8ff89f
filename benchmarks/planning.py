"""What the planner predicts, beside what is published, and on up to 2,048 GPUs: `python -m benchmarks.planning`.

Prints the tables of docs/guides/planning.md, as Markdown, in a second; nothing is measured.
`tests/benchmarks/test_planning.py` fails when the guide has others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.published_runs import MEDITRON_CLUSTER, SIMUMAX_RUNS, TRAINING_RUNS, PublishedRun
from meditron_train.config.load import load_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.planner.hardware import HARDWARE, Hardware
from meditron_train.planner.published_models import published_model
from meditron_train.planner.throughput import StepTime, predict_step, predicted_mfu

_PRESET = Path(__file__).parents[1] / "configs/meditron-70b.yaml"
_NUM_GPUS = (128, 256, 512, 1024, 2048)
_CLUSTERS = {
    "A100, one 200 Gb/s adapter a node": MEDITRON_CLUSTER,
    "A100, eight 200 Gb/s adapters": HARDWARE["a100-80gb"],
    "H100, eight 400 Gb/s adapters": HARDWARE["h100-80gb"],
}


def training_runs() -> str:
    """Whole training runs: predicted / published."""
    rows = [
        (
            run.name,
            f"{run.num_gpus} {run.hardware.name}",
            run.layout_words,
            f"{run.train['seq_len']:,}",
            f"{run.train['global_batch_size'] * run.train['seq_len'] / run.seconds:,.0f}",
            f"{run.speed_ratio:.2f}",
        )
        for run in TRAINING_RUNS
    ]
    return _table(("run", "GPUs", "layout", "sequence", "published tokens/s", "predicted ÷ published"), rows)


def simumax_runs() -> str:
    """SimuMax's runs on eight B200: ours and theirs / measured, for each number of micro-batches."""
    rows = []
    for runs in SIMUMAX_RUNS:
        first = runs[0]
        rows.append(
            (
                first.name,
                first.layout_words,
                f"{first.train['seq_len']:,}",
                " / ".join(str(run.num_microbatches) for run in runs),
                " / ".join(f"{run.seconds:.2f}" for run in runs),
                " / ".join(_ratio(run.speed_ratio) for run in runs),
                " / ".join(_ratio(run.simumax_speed_ratio) for run in runs),
                _ratio(first.memory_ratio),
                _ratio(first.simumax_memory_ratio),
            )
        )
    header = (
        "model",
        "layout",
        "sequence",
        "micro-batches",
        "measured s",
        "speed, ours",
        "SimuMax",
        "memory, ours",
        "SimuMax",
    )
    return _table(header, rows)


def scaling() -> str:
    """Meditron-70B on more GPUs, by more data-parallel replicas of TP8 PP8."""
    rows = []
    for cluster, hardware in _CLUSTERS.items():
        reference = _step(_NUM_GPUS[0], hardware).tokens_per_second / _NUM_GPUS[0]
        for num_gpus in _NUM_GPUS:
            weak, strong = _step(num_gpus, hardware), _step(num_gpus, hardware, grows=False)
            config, model = _meditron(num_gpus)
            mfu = predicted_mfu(weak, model, config.train.seq_len, hardware, "bf16")["parameters"]
            rows.append(
                (
                    cluster,
                    f"{num_gpus:,}",
                    f"{config.train.global_batch_size:,}",
                    f"{weak.tokens_per_second:,.0f}",
                    f"{mfu:.1%}",
                    f"{weak.tokens_per_second / num_gpus / reference:.1%}",
                    f"{abs(weak.data_communication) / weak.total:.1%}",
                    f"{strong.tokens_per_second / num_gpus / reference:.1%}",
                )
            )
    header = (
        "cluster",
        "GPUs",
        "global batch",
        "tokens/s",
        "MFU (6N)",
        "efficiency",
        "exposed gradients and weights",
        "efficiency at batch 512",
    )
    return _table(header, rows)


TABLES = {
    "Predicted beside published training runs": training_runs,
    "Beside SimuMax, predicted ÷ measured": simumax_runs,
    "Meditron-70B on more GPUs": scaling,
}


def misses(tolerance: float = 0.15) -> list[PublishedRun]:
    """Runs whose predicted speed is further from the published one than the tolerance."""
    runs = [*TRAINING_RUNS, *(run for group in SIMUMAX_RUNS for run in group)]
    return [run for run in runs if abs(run.speed_ratio - 1) > tolerance]


def main() -> None:
    for title, table in TABLES.items():
        print(f"## {title}\n\n{table()}\n")


def _meditron(num_gpus: int, *, grows: bool = True) -> tuple[Config, ModelConfig]:
    """The preset and its model; a batch that `grows` keeps the micro-batches of a pipeline."""
    batch = 512 * num_gpus // _NUM_GPUS[0] if grows else 512
    named = published_model(Path("llama-2-70b"))
    assert named is not None
    return load_config(_PRESET, [f"train.global_batch_size={batch}"]), named[1]


def _step(num_gpus: int, hardware: Hardware, *, grows: bool = True) -> StepTime:
    config, model = _meditron(num_gpus, grows=grows)
    return predict_step(config, model, config.parallel.layout(num_gpus), hardware)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
