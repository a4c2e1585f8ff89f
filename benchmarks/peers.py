"""The tools that `train_step` compares: each takes training steps on one model with one batch per step.

All start from the same weights and use AdamW (betas 0.9 and 0.95, weight decay on matrices only), gradients clipped to
norm 1, a constant learning rate and the mean cross-entropy of the next token inside each sequence.

Legend: B sequences, S tokens per sequence, T = B * S packed tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from meditron_train.checkpoint.hf.config import model_config_from_hf
from meditron_train.config.schema import Config
from meditron_train.data.packed import PackedBatch
from meditron_train.parallel import initialize
from meditron_train.train.engine import Engine
from meditron_train.train.guard.step import StepGuard

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-5, 0.1, 1.0


def step_options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark whose tools take turns with training steps on the CPU."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model: does it run at all?")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--json", type=Path, help="also write every step here")
    return parser


@dataclass(frozen=True)
class Workload:
    """One model and its batches."""

    llama: LlamaConfig
    batches: list[torch.Tensor]
    """int64 [B, S] each; step n takes number n modulo their count."""
    precision: str
    """fp32 or bf16 (autocast over fp32 weights for the peers; bf16 weights with fp32 masters here)."""

    @property
    def tokens_per_step(self) -> int:
        return self.batches[0].numel()


@dataclass(frozen=True)
class StepTime:
    wall_s: float
    cpu_s: float
    loss: float


Step = Callable[[int], float]
"""Takes step number n (from 0) and returns its loss."""

Round = Callable[[int], list[StepTime]]
"""Takes that many further steps and times each."""


def timed(step: Step) -> Round:
    """A Round of such steps."""
    steps_done = 0

    def run(num_steps: int) -> list[StepTime]:
        nonlocal steps_done
        times = []
        for _ in range(num_steps):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(steps_done)
            times.append(StepTime(time.perf_counter() - wall, time.process_time() - cpu, loss))
            steps_done += 1
        return times

    return run


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """torch's fused AdamW; weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)


def plain_step(workload: Workload, model: torch.nn.Module, device: str, *, autocast: bool) -> Step:
    """A step of `model`, which lies on `device`, in the fewest lines."""
    optimizer = adamw(model)

    def step(number: int) -> float:
        tokens_BS = workload.batches[number % len(workload.batches)].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain_loop(workload: Workload, model: LlamaForCausalLM) -> Round:
    """LlamaForCausalLM and torch's fused AdamW."""
    model = copy.deepcopy(model).train()
    return timed(plain_step(workload, model, "cpu", autocast=workload.precision == "bf16"))


def hf_trainer(workload: Workload, model: LlamaForCausalLM) -> Round:
    """transformers.Trainer with nothing logged or saved; a step is timed from the end of the one before."""
    model = copy.deepcopy(model)
    output_dir = tempfile.TemporaryDirectory(prefix="hf-trainer-")
    steps_done = 0

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

    class LossKeeper(Trainer):
        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keywords)
            losses.append(loss.item())
            return loss

    clock = Clock()
    losses: list[float] = []
    settings = {
        "output_dir": output_dir.name,
        "per_device_train_batch_size": workload.batches[0].shape[0],
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_NORM,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": workload.precision == "bf16",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }

    def run(num_steps: int) -> list[StepTime]:
        nonlocal steps_done
        # train() again: the model and the optimizer state continue, and the first step includes the start-up.
        numbers = range(steps_done, steps_done + num_steps)
        clock.marks.clear()
        losses.clear()
        rows = [row for n in numbers for row in workload.batches[n % len(workload.batches)]]
        trainer.train_dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer.args.max_steps = num_steps
        started = (time.perf_counter(), time.process_time())
        trainer.train()
        marks = [started, *clock.marks]
        steps_done += num_steps
        return [
            StepTime(now[0] - before[0], now[1] - before[1], loss)
            for before, now, loss in zip(marks[:-1], clock.marks, losses, strict=True)
        ]

    trainer = LossKeeper(model=model, args=TrainingArguments(**settings), train_dataset=[], callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.output_dir_owner = output_dir  # lives, and goes, with the trainer
    return run


def engine_config(workload: Workload, device: str) -> Config:
    """The configuration of our step: all sequences of a batch are one micro-batch."""
    num_sequences, seq_len = workload.batches[0].shape
    return Config.model_validate(
        {
            "model": {"init": "random", "hf_config": workload.llama.to_dict()},
            "data": {"tokenizer": "none", "train": [{"name": "none", "path": "none"}]},
            "optimizer": {
                "lr": LR,
                "betas": BETAS,
                "eps": EPS,
                "weight_decay": WEIGHT_DECAY,
                "clip_grad": MAX_NORM,
            },
            "train": {
                "precision": workload.precision,
                "seq_len": seq_len,
                "micro_batch_size": num_sequences,
                "global_batch_size": num_sequences,
                "device": device,
            },
        }
    )


def engine_step(
    workload: Workload, model: LlamaForCausalLM, device: str, batches: list[PackedBatch] | None = None
) -> Step:
    """meditron-train's own training step, one process: packing, megatron-core and our optimizer included.

    Begins the process group, which `meditron_train.parallel.destroy` ends. `batches` are the workload's, or others of
    the same number of tokens.
    """
    packed = batches or [packed_batch(tokens_BS) for tokens_BS in workload.batches]
    config = engine_config(workload, device)
    mesh = initialize(config.parallel.layout(1), rank=0, local_rank=0, device=device)
    model_config = model_config_from_hf(workload.llama.to_dict())
    engine = Engine(config, model_config, mesh, StateDictSource(model.state_dict()))
    guard = StepGuard(engine, config.resilience, ["host"], ())

    def step(number: int) -> float:
        batch = packed[number % len(packed)]
        return guard.take_step(
            number + 1, [batch], LR, seconds_waited_for_data=0.0, is_saved=False
        ).result.loss

    return step


def our_engine(workload: Workload, model: LlamaForCausalLM) -> Round:
    """meditron-train's own training step."""
    return timed(engine_step(workload, model, "cpu"))


def packed_batch(tokens_BS: torch.Tensor) -> PackedBatch:
    """The same sequences as one packed micro-batch: each is a document, and its last token has no label."""
    num_sequences, seq_len = tokens_BS.shape
    mask_BS = torch.ones(num_sequences, seq_len)
    mask_BS[:, -1] = 0
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, -1] = 0
    return PackedBatch(
        tokens_T=tokens_BS.reshape(-1),
        labels_T=labels_BS.reshape(-1),
        loss_mask_T=mask_BS.reshape(-1),
        positions_T=torch.arange(seq_len).repeat(num_sequences),
        cu_seqlens=torch.arange(0, num_sequences * seq_len + 1, seq_len, dtype=torch.int32),
    )


class StateDictSource:
    """A model in memory, where the engine expects a Hugging Face directory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        tensor = self.tensors[name]
        tensor = tensor if rows is None else tensor[rows[0] : rows[1]]
        return tensor if columns is None else tensor[:, columns[0] : columns[1]]


PEERS: dict[str, Callable[[Workload, LlamaForCausalLM], Round]] = {
    "plain torch loop": plain_loop,
    "Hugging Face Trainer": hf_trainer,
    "meditron-train": our_engine,
}
