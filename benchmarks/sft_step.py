"""A step of supervised finetuning of one process on the CPU, against TRL's SFTTrainer with packing.

    python -m benchmarks.sft_step [--tiny] [--precision fp32|bf16] [--rounds N] [--steps N] [--json FILE]

Both learn the same conversations, ids and marks of the assistant given, best-fit packed into samples of 512 tokens
whose conversations do not see each other; the loss is on the assistant's tokens. They run in this one process and take
turns, a few steps each. Speeds are tokens of conversations (no padding) per second, from the fastest step and from all
steps together. The mean losses show that both learn alike; the order of the samples differs.

Needs: pip install 'meditron-train[bench]'
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.peers import BETAS, EPS, LR, MAX_NORM, WEIGHT_DECAY, StateDictSource, step_options
from meditron_train.checkpoint.hf.config import model_config_from_hf
from meditron_train.config.schema import Config
from meditron_train.data.index_file import bin_path, idx_path, write_index
from meditron_train.data.loader import StepLoader
from meditron_train.data.meta import FORMAT, loss_mask_path, meta_path
from meditron_train.data.packed import build_train_dataset
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.parallel import initialize
from meditron_train.train.engine import Engine
from meditron_train.train.guard.step import StepGuard

SAMPLES_PER_STEP = 4


@dataclass(frozen=True)
class Step:
    wall_s: float
    num_tokens: int
    """Of conversations, without padding."""
    loss: float


Round = Callable[[int], list[Step]]


@dataclass(frozen=True)
class Work:
    """A model and its conversations: (ids, marks of the assistant) of each, both int64 [length]."""

    llama: LlamaConfig
    conversations: list[tuple[np.ndarray, np.ndarray]]
    precision: str
    seq_len: int


def workload(*, tiny: bool, precision: str, num_conversations: int) -> tuple[Work, LlamaForCausalLM]:
    """Conversations of 20 to 300 tokens in turns (a toy: to 30), and a Llama of 23 M parameters, or a toy."""
    seq_len = 64 if tiny else 512
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    normal = dict(hidden_size=384, intermediate_size=1056, num_hidden_layers=6, vocab_size=16000)
    llama = LlamaConfig(
        **(small if tiny else normal),
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
    )
    generator = np.random.default_rng(0)
    conversations = []
    for length in generator.integers(20, 30 if tiny else 300, num_conversations).tolist():
        ids = generator.integers(3, llama.vocab_size, length)
        marks = (np.arange(length) // 10 % 2).astype(np.int64)  # turns of ten tokens
        conversations.append((ids, marks))
    torch.manual_seed(0)
    return Work(llama, conversations, precision, seq_len), LlamaForCausalLM(llama)


def write_dataset(work: Work, prefix: Path) -> None:
    """The conversations as `data tokenize --chat` leaves them."""
    lengths = np.array([len(ids) for ids, _ in work.conversations], dtype=np.int32)
    np.concatenate([ids for ids, _ in work.conversations]).astype("<u2").tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype("<u2"), lengths)
    marks = np.concatenate([marks for _, marks in work.conversations]).astype(np.uint8)
    marks.tofile(loss_mask_path(prefix))
    tokenizer = {"directory": "none", "vocab_size": work.llama.vocab_size, "fingerprint": ""}
    chat = {
        "template": "chatml",
        "template_sha256": "",
        "loss_tokens": int(marks.sum()),
        "loss_mask_sha256": "",
    }
    meta = {
        "format": FORMAT,
        "sha256": "",
        "special_tokens": [],
        "tokenizer": tokenizer,
        "sources": [],
        "chat": chat,
    }
    meta_path(prefix).write_text(json.dumps(meta), encoding="utf-8")


def our_steps(work: Work, model: LlamaForCausalLM, directory: Path) -> Round:
    """meditron-train's own steps: loader, packing, masks, megatron-core and optimizer included."""
    write_dataset(work, directory / "chat")
    config = Config.model_validate(
        {
            "model": {"init": "random", "hf_config": work.llama.to_dict()},
            "data": {"tokenizer": "none", "train": [{"path": str(directory / "chat")}], "chat": {}},
            "optimizer": {
                "lr": LR,
                "betas": BETAS,
                "eps": EPS,
                "weight_decay": WEIGHT_DECAY,
                "clip_grad": MAX_NORM,
            },
            "train": {
                "precision": work.precision,
                "seq_len": work.seq_len,
                "micro_batch_size": SAMPLES_PER_STEP,
                "global_batch_size": SAMPLES_PER_STEP,
                "device": "cpu",
            },
        }
    )
    mesh = initialize(config.parallel.layout(1), rank=0, local_rank=0, device="cpu")
    source = StateDictSource(model.state_dict())
    engine = Engine(config, model_config_from_hf(work.llama.to_dict()), mesh, source)
    guard = StepGuard(engine, config.resilience, ["host"], ())
    dataset = build_train_dataset(config.data, work.seq_len, None)
    loader = StepLoader(dataset, BatchSchedule.of(config.train), SAMPLES_PER_STEP)

    def run(num_steps: int) -> list[Step]:
        steps = []
        for _ in range(num_steps):
            start = time.perf_counter()
            number, batches = next(loader)
            result = guard.take_step(number, batches, LR, seconds_waited_for_data=0.0, is_saved=False).result
            wall_s = time.perf_counter() - start
            samples = loader.sample_numbers(number).reshape(-1).tolist()
            num_tokens = sum(segment.length for n in samples for segment in dataset.segments(n))
            steps.append(Step(wall_s, num_tokens, result.loss))
        return steps

    return run


def trl_steps(work: Work, model: LlamaForCausalLM, directory: Path) -> Round:
    """TRL's SFTTrainer, `packing` by best-fit decreasing, nothing logged or saved.

    A step is timed from the end of the one before. PyTorch's attention: flash-attention needs a GPU.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {f"t{number}": number for number in range(work.llama.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        pad_token="t0",
        eos_token="t1",
    )
    ends: list[float] = []
    losses: list[float] = []
    sizes: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ends.append(time.perf_counter())

    class Timed(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *more: Any, **keywords: Any) -> torch.Tensor:
            sizes.append(inputs["input_ids"].numel())  # without padding: one row of all conversations
            loss = super().training_step(model, inputs, *more, **keywords)
            losses.append(loss.item())
            return loss

    rows = [
        {"input_ids": ids.tolist(), "assistant_masks": marks.tolist()} for ids, marks in work.conversations
    ]
    settings = SFTConfig(
        output_dir=str(directory / "trl"),
        packing=True,
        packing_strategy="bfd",
        max_length=work.seq_len,
        per_device_train_batch_size=SAMPLES_PER_STEP,
        max_steps=1,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,  # TRL's default recomputes; neither tool does here
        use_cpu=True,
        bf16=work.precision == "bf16",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Timed(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)

    def run(num_steps: int) -> list[Step]:
        for values in (ends, losses, sizes):
            values.clear()
        trainer.args.max_steps = num_steps
        started = time.perf_counter()
        trainer.train()
        times = np.diff([started, *ends]).tolist()
        return [Step(*values) for values in zip(times, sizes, losses, strict=True)]

    return run


TOOLS = {"TRL SFTTrainer": trl_steps, "meditron-train": our_steps}


def measure(
    work: Work, model: LlamaForCausalLM, directory: Path, *, rounds: int, steps: int
) -> dict[str, list[Step]]:
    """Steps by tool: a round to warm up and the first step of each round are dropped."""
    runs = {}
    for name, make in TOOLS.items():
        own = LlamaForCausalLM(work.llama)
        own.load_state_dict(model.state_dict())
        runs[name] = make(work, own, directory)
    taken: dict[str, list[Step]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            measured = runs[name](steps + 1)
            if number > 0:
                taken[name] += measured[1:]
    return taken


def table(taken: dict[str, list[Step]]) -> str:
    """Markdown: tokens of conversations per second; in brackets the ratio to TRL."""
    speeds = {
        name: (
            max(step.num_tokens / step.wall_s for step in steps),
            sum(step.num_tokens for step in steps) / sum(step.wall_s for step in steps),
        )
        for name, steps in taken.items()
    }
    base = speeds["TRL SFTTrainer"]
    lines = ["| | tokens/s, fastest step | all steps | tokens a step | mean loss |", "|---|---|---|---|---|"]
    for name, values in speeds.items():
        cells = [f"{value:.0f} ({value / of:.2f})" for value, of in zip(values, base, strict=True)]
        steps = taken[name]
        size = sum(step.num_tokens for step in steps) / len(steps)
        loss = sum(step.loss for step in steps) / len(steps)
        lines.append(f"| {name} | {' | '.join(cells)} | {size:.0f} | {loss:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = step_options(__doc__).parse_args(arguments)

    import trl

    torch.set_num_threads(options.threads)
    work, model = workload(tiny=options.tiny, precision=options.precision, num_conversations=400)
    with tempfile.TemporaryDirectory(prefix="sft-step-") as directory:
        taken = measure(work, model, Path(directory), rounds=options.rounds, steps=options.steps)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Llama of {num_parameters / 1e6:.1f} M parameters, {SAMPLES_PER_STEP} x {work.seq_len} tokens a step, "
        f"{options.precision}, {options.threads} threads, {options.rounds} rounds of {options.steps} steps; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}\n"
    )
    print(table(taken))
    if options.json:
        options.json.write_text(
            json.dumps({name: [vars(step) for step in steps] for name, steps in taken.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
