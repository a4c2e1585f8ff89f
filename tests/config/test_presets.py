"""The presets in configs/ carry the published numbers, and fit the models they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.config.check import check_config
from meditron_train.config.load import load_config
from meditron_train.corpus.text.rules import SPECIAL_TOKENS
from tests.config.shapes import LLAMA2

CONFIGS = Path(__file__).parents[2] / "configs"
SFT_TASKS = ("medqa", "medmcqa", "pubmedqa")
STRUCTURE_TOKENS = ("bib_ref", "fig_ref", "bib", "fig", "table", "formula")


@pytest.mark.parametrize(
    ("preset", "size", "world_size"),
    [
        ("llama2-7b", "7b", 8),
        ("llama2-13b", "13b", 8),
        ("llama2-70b", "70b", 64),
        ("meditron-7b", "7b", 64),
        ("meditron-70b", "70b", 128),
        *((f"sft-{task}{form}", "7b", 8) for task in SFT_TASKS for form in ("", "-cot")),
    ],
)
def test_presets_fit_their_model(preset, size, world_size):
    config = load_config(CONFIGS / f"{preset}.yaml")
    num_special = len(config.data.special_tokens)
    model = LLAMA2[size].model_copy(update={"vocab_size": 32000 + num_special})
    check_config(config, model, world_size, tokenizer_vocab_size=32000 + num_special, check_files=False)
    assert config.logging.run_dir == Path("runs") / preset


def test_every_preset_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    sft = {f"sft-{task}{form}" for task in SFT_TASKS for form in ("", "-cot")}
    assert names == {"demo", "llama2-7b", "llama2-13b", "llama2-70b", "meditron-7b", "meditron-70b", *sft}


@pytest.mark.parametrize(
    ("preset", "lr", "seq_len", "micro", "global_", "steps", "tensor", "pipeline", "data", "gpus"),
    [
        ("meditron-7b", 3e-4, 2048, 10, 1600, 14700, 4, 1, 16, 64),
        ("meditron-70b", 1.5e-4, 4096, 2, 512, 23000, 8, 8, 2, 128),
    ],
)
def test_meditron_as_published(preset, lr, seq_len, micro, global_, steps, tensor, pipeline, data, gpus):
    config = load_config(CONFIGS / f"{preset}.yaml")
    optimizer, train, parallel = config.optimizer, config.train, config.parallel
    assert (optimizer.lr, optimizer.min_lr) == (lr, 1e-6)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-5)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert (config.schedule.kind, config.warmup_steps, config.decay_steps) == ("cosine", 2000, steps)
    assert (train.seq_len, train.micro_batch_size, train.global_batch_size) == (seq_len, micro, global_)
    assert (train.steps, train.precision, train.recompute) == (steps, "bf16", "selective")
    assert (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline) == (tensor, pipeline, 1)
    assert parallel.layout(gpus).data == data
    assert parallel.layout(gpus).sequence
    assert parallel.distributed_optimizer
    pairs = [(f"[{name}]", f"[/{name}]") for name in STRUCTURE_TOKENS]
    assert config.data.special_tokens == tuple(token for pair in pairs for token in pair) == SPECIAL_TOKENS
    weights = {source.name: source.weight for source in config.data.train}
    assert weights == {"guidelines": 0.107, "abstracts": 5.48, "papers": 40.7, "replay": 0.42}


@pytest.mark.parametrize("form", ["", "-cot"])
@pytest.mark.parametrize("task", SFT_TASKS)
def test_supervised_finetuning_as_published(task, form):
    config = load_config(CONFIGS / f"sft-{task}{form}.yaml")
    optimizer, train = config.optimizer, config.train
    assert (optimizer.lr, optimizer.min_lr, optimizer.betas, optimizer.eps) == (2e-5, 2e-6, (0.9, 0.95), 1e-5)
    assert (optimizer.weight_decay, optimizer.clip_grad, config.schedule.kind) == (0.1, 1.0, "cosine")
    assert (config.schedule.warmup_fraction, train.epochs, train.global_batch_size) == (0.1, 3, 64)
    assert (train.seq_len, train.precision, config.parallel.layout(64).data) == (2048, "bf16", 16)
    assert (config.data.packing, config.data.chat.template) == ("best_fit", "chatml")
    assert config.data.chat.prompt_loss_weight == 0
    assert config.data.special_tokens == ("<|im_start|>", "<|im_end|>")
    assert config.data.train[0].path == Path("data") / f"sft-{task}{form}"


def test_the_70b_run_is_48_billion_tokens():
    train = load_config(CONFIGS / "meditron-70b.yaml").train
    assert train.steps * train.global_batch_size * train.seq_len == pytest.approx(48e9, rel=0.01)


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_llama2_uses_its_own_optimizer_settings(size):
    config = load_config(CONFIGS / f"llama2-{size}.yaml")
    assert config.optimizer.lr == (1.5e-4 if size == "70b" else 3e-4)
    assert config.optimizer.min_lr == pytest.approx(config.optimizer.lr / 10)
    assert config.train.seq_len * config.train.global_batch_size == 2**22


def test_paths_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("LLAMA2_7B", "/models/llama")
    monkeypatch.setenv("GAP_REPLAY", "/corpus")
    config = load_config(CONFIGS / "meditron-7b.yaml")
    assert config.model.from_ == config.data.tokenizer == Path("/models/llama")
    assert config.data.train[1].path == Path("/corpus/tokenized/abstracts.train")


def test_the_demo_runs_as_the_readme_says():
    config = load_config(CONFIGS / "demo.yaml", ["parallel.tensor=2", "parallel.pipeline=2"])
    tiny = LLAMA2["7b"].model_copy(
        update={"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 1000}
    )
    check_config(config, tiny, 4, check_files=False)
    assert config.model.from_ == Path("runs/demo/base")
    assert config.data.train[0].path == Path("runs/demo/data/tokenized/medical.train")
