"""What a user does first, by the commands of an installed package alone; any Python that has it runs this file.

    python tour.py EMPTY_DIRECTORY

Leaves with an AssertionError, or the failed command's exit code, at the first thing that does not work.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

WORDS = (
    "the dose of mevatrin for adults with lumen fever is four grams a day and never more than nine".split()
)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def command(*words: object) -> str:
    """Run it; its output, which is also shown when it fails."""
    print("tour:", *words, flush=True)
    done = subprocess.run(
        [str(word) for word in words],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        print(done.stdout, flush=True)
        raise SystemExit(done.returncode)
    return done.stdout


def meditron(*words: object) -> str:
    return command(BIN / "meditron-train", *words)


def train(config: Path, num_steps: int) -> str:
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2)
    return command(*torchrun, "-m", "meditron_train", "train", config, f"train.steps={num_steps}")


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    import sentencepiece

    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=SHAPE["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def write_sources(directory: Path, texts: list[str]) -> list[Path]:
    """The same texts as compressed JSON lines and as Parquet."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    directory.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (directory / "lines.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / "table.parquet")
    return sorted(directory.iterdir())


def configuration(directory: Path) -> dict[str, Any]:
    return {
        "model": {"init": "random", "hf_config": SHAPE},
        "parallel": {"tensor": 2},
        "data": {
            "tokenizer": str(directory / "tokenizer"),
            "train": [{"name": "lines", "path": str(directory / "data/lines"), "weight": 1.0}],
            "validation": [{"name": "table", "path": str(directory / "data/table")}],
        },
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "train": {
            "seq_len": 64,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "checkpoint": {"interval": 2, "async_save": True},
        "validation": {"interval": 2, "steps": 1},
        "logging": {"run_dir": str(directory / "run"), "wandb": "offline"},
    }


def tour(directory: Path) -> None:
    meditron("--help")
    meditron("doctor")
    assert "meditron-70b" in meditron("config", "list")
    meditron("config", "init", "llama2-7b", directory / "preset.yaml")
    meditron("launch-scripts", directory / "launch")
    assert (directory / "launch/train.sbatch").is_file()
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=20)) for _ in range(200)]
    write_tokenizer(directory / "tokenizer", texts)
    (directory / "data").mkdir()
    for source in write_sources(directory / "texts", texts):
        output = directory / "data" / source.name.partition(".")[0]
        meditron("data", "tokenize", source, "--tokenizer", directory / "tokenizer", "--output", output)

    config, run = directory / "config.yaml", directory / "run"
    config.write_text(json.dumps(configuration(directory)))  # JSON is YAML
    train(config, 3)
    assert "resuming from" in train(config, 5)
    assert json.loads((run / "status.json").read_text())["step"] == 5
    assert list(run.rglob("events.out.tfevents.*")), "no TensorBoard file"

    meditron("convert", "hf-to-megatron", run / "hf", directory / "sharded")
    meditron("convert", "verify", run / "hf", directory / "sharded")
    meditron("convert", "verify", run / "checkpoints" / "step_00000005", directory / "sharded")
    meditron("convert", "megatron-to-hf", directory / "sharded", directory / "again")
    original, again = (path / "model.safetensors" for path in (run / "hf", directory / "again"))
    assert original.read_bytes() == again.read_bytes()
    options = ("--prompt", "the dose of", "--max-new-tokens", 4, "--device", "cpu")
    assert meditron("generate", directory / "again", *options).startswith("the dose of")


if __name__ == "__main__":
    tour(Path(sys.argv[1]).absolute())
    print("tour: all passed", flush=True)
