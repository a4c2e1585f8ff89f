"""Training runs whose speed others have published, as the planner's input, with what SimuMax predicts for them.

Sources, read in November 2026:

- Chen et al. 2023 (arXiv 2311.16079): Meditron-70B; one 200 Gb/s adapter per node.
- NVIDIA's performance tables of NeMo for Llama 3.1, BF16.
- SimuMax v1.2 (https://github.com/MooreThreads/SimuMax, Apache-2.0), `docs/b200/b200_release_v1.2_summary.md` and
  `docs/release_v1.2.md`: step times and allocated memory of Megatron-LM on one node of eight B200, measured and
  predicted. One sequence per micro-batch, bf16, distributed optimizer, nothing recomputed, nothing overlapped. Of the
  70B 12 layers (8 in the interleaved run), of the 405B 4 layers, with 16 key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.planner.hardware import HARDWARE, Hardware
from meditron_train.planner.memory import estimate_stages
from meditron_train.planner.throughput import StepTime, predict_step

_GIB = 2**30
_COMMON = {"head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
LLAMA2_70B = ModelConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8, **_COMMON
)  # fmt: skip
LLAMA3_70B = LLAMA2_70B.model_copy(update={"vocab_size": 128256})
LLAMA3_8B = LLAMA3_70B.model_copy(
    update={"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32}
)
LLAMA3_405B = LLAMA3_70B.model_copy(
    update={"hidden_size": 16384, "intermediate_size": 53248, "num_heads": 128, "num_kv_heads": 16}
)

# The Meditron cluster, and a node of eight B200: NVIDIA's data sheet, but for the efficiencies. Those are SimuMax's
# measurements of single kernels and collectives there: large products reach 0.49 (forward), 0.48 (gradient of the
# input) and 0.46 (of the weight) of the peak, which is 0.49 before the side of 4,096 tokens is taken off;
# all-gather and reduce-scatter 0.67 of NVLink.
MEDITRON_CLUSTER = replace(HARDWARE["a100-80gb"], network_bytes_per_second=25e9)
B200 = replace(
    HARDWARE["h100-80gb"],
    name="b200-180gb",
    memory_bytes=178 * _GIB,
    bf16_flops=2250e12,
    memory_bytes_per_second=8e12,
    nvlink_bytes_per_second=900e9,
    power_w=1000,
    matmul_efficiency=0.49,
    link_efficiency=0.67,
)


@dataclass(frozen=True)
class PublishedRun:
    """One run.

    Attributes:
        parallel, train: the configuration's sections.
        seconds: of a step, as measured.
        simumax_seconds: as SimuMax predicts; None where it publishes nothing.
        memory_gib, simumax_memory_gib: allocated on the fullest GPU, measured and predicted.
    """

    name: str
    model: ModelConfig
    hardware: Hardware
    num_gpus: int
    parallel: dict[str, Any]
    train: dict[str, Any]
    seconds: float
    simumax_seconds: float | None = None
    memory_gib: float | None = None
    simumax_memory_gib: float | None = None

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "model": {"from": "none"},
                "data": {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]},
                "parallel": self.parallel,
                "train": self.train,
            }
        )

    @property
    def layout_words(self) -> str:
        """The sizes above 1, as in `TP8 PP8 DP2`."""
        layout = self.config.parallel.layout(self.num_gpus)
        sizes = {
            "TP": layout.tensor,
            "PP": layout.pipeline,
            "VP": layout.virtual_pipeline,
            "CP": layout.context,
            "DP": layout.data,
        }
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)

    @property
    def num_microbatches(self) -> int:
        """Of each pipeline in a step."""
        layout = self.config.parallel.layout(self.num_gpus)
        return self.train["global_batch_size"] // (self.train["micro_batch_size"] * layout.data)

    def predicted(self) -> StepTime:
        config = self.config
        return predict_step(config, self.model, config.parallel.layout(self.num_gpus), self.hardware)

    @property
    def speed_ratio(self) -> float:
        """Predicted / published tokens per second."""
        return self.seconds / self.predicted().total

    @property
    def simumax_speed_ratio(self) -> float | None:
        return None if self.simumax_seconds is None else self.seconds / self.simumax_seconds

    @property
    def memory_ratio(self) -> float | None:
        """Counted / measured bytes of the fullest stage, without the planner's allowance."""
        if self.memory_gib is None:
            return None
        config = self.config
        stages = estimate_stages(config, self.model, config.parallel.layout(self.num_gpus))
        return max(stage.counted for stage in stages) / _GIB / self.memory_gib

    @property
    def simumax_memory_ratio(self) -> float | None:
        if self.memory_gib is None or self.simumax_memory_gib is None:
            return None
        return self.simumax_memory_gib / self.memory_gib


_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_S8192 = {"seq_len": 8192, "micro_batch_size": 1, "global_batch_size": 128}
_MEDITRON_TRAIN = {
    "seq_len": 4096, "micro_batch_size": 2, "global_batch_size": 512, "recompute": "selective",
}  # fmt: skip

MEDITRON_70B = PublishedRun(
    "Meditron-70B", LLAMA2_70B, MEDITRON_CLUSTER, 128,
    {"tensor": 8, "pipeline": 8, "sequence": True}, _MEDITRON_TRAIN, seconds=512 * 4096 / 40_200,
)  # fmt: skip
TRAINING_RUNS = [
    MEDITRON_70B,
    PublishedRun(
        "Llama-3.1-8B", LLAMA3_8B, HARDWARE["h100-80gb"], 8,
        {"context": 2, **_OVERLAP}, _S8192, seconds=128 * 8192 / (8 * 10_153),
    ),
    PublishedRun(
        "Llama-3.1-70B", LLAMA3_70B, HARDWARE["h100-80gb"], 64,
        {"tensor": 4, "pipeline": 4, "virtual_pipeline": 5, "context": 2, "sequence": True, **_OVERLAP},
        _S8192, seconds=128 * 8192 / (64 * 1_113),
    ),
]  # fmt: skip

# Model, layers, tensor, pipeline, chunks, context, sequence length, GiB measured and predicted, then for each number
# of micro-batches the milliseconds measured and predicted.
_SIMUMAX = [
    ("70B", 12, 1, 2, 1, 1, 4096, 66.55, 66.44, {4: (843.0, 828.76), 8: (1476.8, 1441.2), 32: (5436.5, 5115.7)}),
    ("70B", 12, 2, 1, 1, 1, 4096, 60.68, 60.51, {4: (725.5, 698.81), 8: (1387.0, 1309.8), 32: (5376.5, 4975.9)}),
    ("70B", 12, 4, 1, 1, 1, 4096, 39.07, 38.94, {4: (409.8, 395.23), 8: (765.6, 747.66), 32: (2964.6, 2862.2)}),
    ("70B", 12, 8, 1, 1, 1, 4096, 28.29, 28.17, {4: (280.9, 255.71), 8: (556.7, 493.39), 32: (2073.7, 1919.4)}),
    ("70B", 8, 1, 4, 2, 1, 4096, None, None, {8: (680.7, 661.21)}),
    ("405B", 4, 1, 2, 1, 1, 4096, 87.08, 86.88, {4: (1074.6, 1072.7), 8: (1935.4, 1870.8), 32: (7046.4, 6659.3)}),
    ("405B", 4, 2, 1, 1, 1, 4096, 81.59, 81.31, {4: (907.3, 860.73), 8: (1716.8, 1600.4), 32: (6604.1, 6038.7)}),
    ("405B", 4, 4, 1, 1, 1, 4096, 52.89, 52.68, {4: (476.0, 452.92), 8: (899.6, 846.87), 32: (3455.4, 3210.6)}),
    ("405B", 4, 8, 1, 1, 1, 4096, 38.57, 38.38, {4: (258.8, 255.83), 8: (488.1, 486.81), 32: (1901.8, 1872.6)}),
    ("70B", 12, 2, 1, 1, 4, 32768, 68.43, 68.16, {4: (1758.0, 1595.0)}),
    ("70B", 12, 1, 1, 1, 8, 32768, 104.51, 104.43, {4: (1768.1, 1627.2)}),
    ("405B", 4, 2, 1, 1, 4, 32768, 87.03, 86.55, {4: (1984.7, 1814.3)}),
    ("405B", 4, 1, 1, 1, 8, 32768, 139.22, 139.13, {4: (2003.6, 1896.2)}),
    ("70B", 12, 2, 1, 1, 4, 131072, 112.67, 111.80, {4: (11315.7, 10670.4)}),
    ("70B", 12, 1, 1, 1, 8, 131072, 147.99, 147.89, {4: (11301.9, 10515.7)}),
    ("405B", 4, 2, 1, 1, 4, 131072, 118.13, 116.50, {4: (10577.6, 10043.5)}),
]  # fmt: skip


def _simumax_runs() -> Iterator[list[PublishedRun]]:
    for size, layers, tensor, pipeline, chunks, context, seq_len, measured, predicted, times in _SIMUMAX:
        shape = LLAMA3_70B if size == "70B" else LLAMA3_405B
        data = 8 // (tensor * pipeline * context)
        yield [
            PublishedRun(
                f"Llama-3-{size}, {layers} layers",
                shape.model_copy(update={"num_layers": layers}),
                B200,
                8,
                {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "virtual_pipeline": chunks,
                    "context": context,
                    "sequence": tensor > 1,
                },
                {"seq_len": seq_len, "micro_batch_size": 1, "global_batch_size": number * data},
                seconds=milliseconds / 1000,
                simumax_seconds=simumax_milliseconds / 1000,
                memory_gib=measured,
                simumax_memory_gib=predicted,
            )
            for number, (milliseconds, simumax_milliseconds) in times.items()
        ]


# Those of one model and layout together: they differ by the number of micro-batches.
SIMUMAX_RUNS: list[list[PublishedRun]] = list(_simumax_runs())
