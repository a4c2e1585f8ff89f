"""What a run is about to do, for the console, before its first step."""

from __future__ import annotations

import os

import torch

from meditron_train.config.finetuning import num_adapter_parameters
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.train.setup import Plan


def summarize(plan: Plan, *, is_resume: bool) -> str:
    """Model, layout, length, data, directory and W&B, one line each."""
    config, model, layout = plan.config, plan.model, plan.layout
    origin = config.model.from_ or "random weights"
    schedule = BatchSchedule.of(config.train)
    num_samples = schedule.samples_before(config.train.steps + 1)
    num_tokens = num_samples * config.train.seq_len
    tokens_per_step = config.train.global_batch_size * config.train.seq_len
    epochs = plan.train_data.epochs(num_samples)
    lines = {
        "run": f"{config.logging.run_dir}{', continued' if is_resume else ''}",
        "model": f"{model.num_parameters:,} parameters from {origin}: {model.num_layers} layers of "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}; {config.train.precision}",
        "trains": _trained(plan),
        "layout": f"{layout.world_size} {'ranks' if layout.world_size > 1 else 'rank'}: tensor {layout.tensor} x "
        f"pipeline {layout.pipeline} x context {layout.context} x data {layout.data}",
        "steps": f"{config.train.steps:,} of {config.train.global_batch_size} samples x {config.train.seq_len} = "
        f"{tokens_per_step:,} tokens each, {num_tokens:,} in all",
        "data": ", ".join(f"{name} {_count(number)}" for name, number in epochs.items()),
        "threads": f"{torch.get_num_threads()} per rank on the CPU, OMP_WAIT_POLICY "
        f"{os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        "W&B": _wandb(config.logging.wandb, config.logging.wandb_project),
    }
    if chats := _conversations(plan):
        lines["chats"] = chats
    return "\n".join(f"  {name:<7} {text}" for name, text in lines.items())


def _conversations(plan: Plan) -> str:
    """How many there are, and in a step, of each source that holds conversations."""
    sources = {source.name: source for source in plan.train_data.sources}
    parts = []
    for name, per_sample in plan.train_data.conversations_per_sample.items():
        found = sources[name].conversations
        assert found is not None
        parts.append(
            f"{name} {len(sources[name].documents):,}, {per_sample:.1f} in a sample, about "
            f"{per_sample * plan.config.train.global_batch_size:,.0f} in a step of its own"
            + (
                f"; {found.num_too_long:,} too long, {found.num_dropped:,} dropped"
                if found.num_too_long
                else ""
            )
        )
    return ", ".join(parts)


def _trained(plan: Plan) -> str:
    lora = plan.config.lora
    if lora is None:
        return "the whole model"
    return (
        f"{num_adapter_parameters(lora, plan.model):,} parameters of adapters: rank {lora.rank}, scale {lora.scale:g}, "
        f"on {', '.join(lora.targets)}"
    )


def _count(epochs: float) -> str:
    return f"{epochs:.2f} epochs" if epochs >= 0.01 else f"{epochs:.1e} epochs"


def _wandb(mode: str, project: str) -> str:
    return {
        "disabled": "disabled (logging.wandb)",
        "offline": "offline: nothing leaves this machine",
        "online": f"ONLINE: metrics and the configuration are sent to the project {project}",
        "auto": "ONLINE where there is a key and a network: metrics and the configuration are then sent to the "
        f"project {project}",
    }[mode]
