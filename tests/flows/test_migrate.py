"""Megatron's command lines as our configurations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from meditron_train.checkpoint.hf.config import random_model_config
from meditron_train.checkpoint.megatron.known_args import is_known
from meditron_train.config.check import overwritten_inputs
from meditron_train.config.load import load_config
from meditron_train.config.schema import Config
from meditron_train.flows.megatron_arguments import ALREADY, LEFT_OUT, SAME, SHAPE, SWITCHES, WANDB
from meditron_train.flows.migrate import migrate
from tests.refusal import refused

GUIDE = Path(__file__).parents[2] / "docs/guides/migration.md"

# As epfLLM's finetuning script gives them for Meditron-70B.
MEDITRON_70B = """
torchrun finetune.py --tensor_model_parallel_size 8 --pipeline_model_parallel_size 8 --load /models/llama2-70b
    --save /runs/meditron-70b --use_bf16_nothing --data_path 0.4 /data/pubmed 0.6 /data/replay
    --tokenizer_type SentencePieceTokenizer --vocab_file=/models/llama2-70b/tokenizer.model --no_new_tokens
    --vocab_extra_ids_list [bib_ref],[/bib_ref] --bf16 --global_batch_size 512 --micro_batch_size 2
    --train_iters 23000 --lr 1.5e-4 --min_lr 1.0e-6 --lr_decay_style cosine --lr_warmup_iters 2000
    --weight_decay 0.1 --clip_grad 1.0 --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5 --use_flash_attn
    --sequence_parallel --use_distributed_optimizer --recompute_granularity selective --seq_length 4096
    --use_rms_norm --glu_activation swiglu --no_tie_embed_logits --split 989,10,1
"""


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "batch_ramp":
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def test_meditrons_own_command_line(tmp_path):
    result = migrate(shlex.split(MEDITRON_70B))
    assert flat(result.values) == {
        "parallel.tensor": 8,
        "parallel.pipeline": 8,
        "parallel.sequence": True,
        "parallel.distributed_optimizer": True,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 512,
        "train.steps": 23000,
        "train.seq_len": 4096,
        "train.precision": "bf16",
        "train.recompute": "selective",
        "optimizer.lr": 1.5e-4,
        "optimizer.min_lr": 1e-6,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 1.0,
        "optimizer.betas": [0.9, 0.95],
        "optimizer.eps": 1e-5,
        "schedule.kind": "cosine",
        "schedule.warmup_steps": 2000,
        "model.from": "/models/llama2-70b",
        "logging.run_dir": "/runs/meditron-70b",
        "data.tokenizer": "/models/llama2-70b",
        "data.train": [{"path": "/data/pubmed", "weight": 0.4}, {"path": "/data/replay", "weight": 0.6}],
        "data.special_tokens": ["[bib_ref]", "[/bib_ref]"],
        "data.validation_fraction": 0.01,
    }
    assert result.without_equal == ["--use_bf16_nothing", "--no_new_tokens", "--glu_activation swiglu"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(result.values))
    config = load_config(tmp_path / "run.yaml")  # our own schema takes it
    assert config.parallel.tensor == 8 and config.data.train[1].weight == 0.6


def test_megatron_lms_spelling_ramps_samples_and_interleaving():
    line = """--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8
        --rotary-base 500000 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2
        --global-batch-size 256 --train-samples 25600 --lr-warmup-samples 2560 --rampup-batch-size 32 32 12800
        --lr-decay-style WSD --lr-decay-iters 150 --lr-wsd-decay-iters 20 --fp16
        --recompute-activations --adam-beta2 0.98 --train-data-path a b"""
    values = flat(migrate(shlex.split(line)).values)
    assert values["model.hf_config.num_key_value_heads"] == 8
    assert values["model.hf_config.rope_theta"] == 500000
    assert values["parallel.virtual_pipeline"] == 4
    # Each of the seven sizes below 256 lasts until a seventh more of the 12,800 samples is taken: 58 + 29 + 19 + 14 +
    # 12 + 9 + 9 = 150 steps with 12,992 samples; the other 12,608 take 50 steps of 256. The warm-up ends after 58 steps
    # of 32 and 11 of 64.
    assert (values["train.steps"], values["schedule.warmup_steps"]) == (200, 69)
    assert values["train.batch_ramp"] == {"start": 32, "increment": 32, "samples": 12800}
    assert values["schedule.decay_steps"] == 20
    assert (values["schedule.kind"], values["train.recompute"]) == ("wsd", "selective")
    assert values["optimizer.betas"] == [0.9, 0.98]
    assert values["data.train"] == [{"path": "a"}, {"path": "b"}]
    assert values["train.precision"] == "bf16" and any(
        "fp16" in note for note in migrate(shlex.split(line)).notes
    )


def test_samples_without_a_batch_have_no_equal():
    result = migrate(["--train-samples", "25600"])
    assert "steps" not in result.values["train"]
    assert result.without_equal == ["--train_samples 25600"]


def test_names_that_look_like_numbers_stay_words(tmp_path):
    line = "--save 2024 --wandb-exp-name 0042 --load m --tokenizer-model t --data-path d"
    values = migrate(line.split()).values
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "run.yaml")
    assert (config.logging.wandb_name, str(config.logging.run_dir)) == ("0042", "2024")


def test_what_was_left_out_is_megatrons_default():
    """Megatron-LM's arguments.py: linear decay to 0, Adam with 0.9, 0.999 and 1e-8, weight decay 0.01."""
    result = migrate(["--lr", "1e-4", "--adam-beta1", "0.8"])
    values = flat(result.values)
    assert values["optimizer.betas"] == [0.8, 0.999]
    assert (values["schedule.kind"], values["optimizer.min_lr"]) == ("linear", 0.0)
    assert (values["optimizer.weight_decay"], values["optimizer.eps"]) == (0.01, 1e-8)
    assert sum("left out" in note for note in result.notes) == len(LEFT_OUT) - 1


SHAPED = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --vocab-size 512"


def test_load_with_the_path_of_save_is_a_fresh_start(tmp_path):
    """Megatron's usual script gives both: it starts from scratch as long as the directory is empty."""
    line = f"--save runs/a --load runs/a/ {SHAPED} --tokenizer-model t --data-path d"
    result = migrate(line.split())
    assert result.values["model"]["init"] == "random" and "from" not in result.values["model"]
    assert sum("--load is --save" in note for note in result.notes) == 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(result.values))
    assert overwritten_inputs(load_config(tmp_path / "run.yaml")) == []
    assert "model" not in migrate(["--save", "runs/a", "--load", "runs/a"]).values


def test_a_shape_that_load_replaces_is_named():
    result = migrate(f"--save runs/a --load runs/b {SHAPED}".split())
    assert result.values["model"] == {"from": "runs/b"}
    notes = "\n".join(result.notes)
    assert "not taken: --num_layers 4, --hidden_size 64, --ffn_hidden_size 128" in notes
    assert "convert megatron-to-hf runs/b HF_DIR" in notes
    assert "not taken" not in "\n".join(migrate(["--load", "runs/b"]).notes)


@pytest.mark.parametrize(
    ("arguments", "tied", "epsilon"),
    [
        ("", True, 1e-5),
        ("--untie-embeddings-and-output-weights --norm-epsilon 1e-6", False, 1e-6),
        ("--no_tie_embed_logits --layernorm_epsilon 1e-8", False, 1e-8),
    ],
)
def test_fresh_weights_have_megatrons_epsilon_and_tied_embeddings(arguments, tied, epsilon):
    result = migrate(f"{SHAPED} {arguments}".split())
    model = random_model_config(result.values["model"]["hf_config"], None)
    assert (model.tie_embeddings, model.rms_norm_eps) == (tied, epsilon)
    names = {note.partition(":")[0] for note in result.notes}
    assert (
        ("model.hf_config.tie_word_embeddings" in names) == ("model.hf_config.rms_norm_eps" in names) == tied
    )


@pytest.mark.parametrize(
    ("arguments", "samples", "batch"),
    [
        ("--train-iters 1000 --lr-decay-iters 600", 0.05 * 600 * 8, 8),
        (
            "--train-iters 1000 --lr-decay-iters 600 --lr-decay-style WSD --lr-wsd-decay-iters 100",
            0.05 * 600 * 8,
            8,
        ),
        ("--train-samples 8000 --lr-decay-samples 4800 --lr-warmup-samples 0", 0.05 * 4800, 8),
        ("--train-samples 8000 --rampup-batch-size 4 4 4000", 0.05 * 8000, 4),
    ],
)
def test_the_warmup_is_a_share_of_the_decay(arguments, samples, batch):
    """As in Megatron-LM's get_optimizer_param_scheduler: lr_warmup_steps = lr_warmup_fraction * lr_decay_steps."""
    result = migrate(f"--lr-warmup-fraction 0.05 --global-batch-size 8 {arguments}".split())
    schedule = result.values["schedule"]
    assert schedule["warmup_steps"] == samples / batch and "warmup_fraction" not in schedule
    assert any("lr_warmup_fraction" in note for note in result.notes) and result.without_equal == []


def test_the_warmup_is_a_share_of_the_run_where_the_decay_is_as_long():
    for line in ("--train-iters 1000 --lr-warmup-iters 0", "--train-samples 8000 --global-batch-size 8"):
        schedule = migrate(f"--lr-warmup-fraction 0.05 {line}".split()).values["schedule"]
        assert schedule["warmup_fraction"] == 0.05 and "warmup_steps" not in schedule


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no argument of Megatron's"),
        ("--lr 1 2", "--lr has 2 values"),
        ("--lr-decay-style inverse-square-root", "cosine, linear, constant and wsd"),
        ("--rampup-batch-size 1 2", "START INCREMENT SAMPLES"),
        ("--data-path 0.5 a 0.5", "has no path behind it"),
        ("--global-batch-size 8 --train-samples many", "not a number"),
        ("--global-batch-size 8 --train-samples inf", "not a number"),
        ("--global-batch-size 0.5 --train-samples 64", "--global_batch_size is 0.5"),
        ("--split abc", "--split is 'abc': it takes shares"),
        ("--split", "--split is '': it takes shares"),
        ("--split 1,nan", "it takes shares"),
        ("--num-layers 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 0",
         "--num_layers_per_virtual_pipeline_stage is 0"),
        ("--num-layers 8 --pipeline-model-parallel-size 0 --num-layers-per-virtual-pipeline-stage 1",
         "--pipeline_model_parallel_size is 0"),
    ],
)  # fmt: skip
def test_bad_input(line, said):
    with refused(said):
        migrate(line.split())


@pytest.mark.parametrize("line", ["--wandb_logger", "--wandb-project meditron", "--wandb-exp-name 7b"])
def test_a_script_that_logs_to_weights_and_biases_still_does(line):
    result = migrate(line.split())
    assert result.values["logging"]["wandb"] == "auto"
    assert result.without_equal == []


def _known(key: str) -> bool:
    place = Config
    for part in key.split("."):
        names = {entry.alias or name: entry for name, entry in place.model_fields.items()}
        if part not in names:
            return False
        place = names[part].annotation
    return True


def test_the_table_names_keys_of_ours_and_arguments_of_theirs():
    assert [key for key in (*SAME.values(), *SWITCHES.values()) if not _known(key)] == []
    # Switches that a checkpoint, from which the list of theirs comes, has under another name.
    other_names = {"disable_bias_linear", "no_tie_embed_logits", "use_rms_norm"}
    ours = {*SAME, *SWITCHES, *SHAPE, *ALREADY, *WANDB} - other_names
    assert [name for name in sorted(ours) if not is_known(name)] == []


def test_the_guide_shows_the_whole_table():
    text = GUIDE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| `?([^`|]+?)`? \|$", text, re.MULTILINE))
    for name, key in {**SAME, **SWITCHES}.items():
        assert rows.get(name.replace("_", "-")) == key, name
    for name, key in SHAPE.items():
        assert rows.get(name.replace("_", "-")) == f"model.hf_config.{key}", name
    for name, why in ALREADY.items():
        assert rows.get(name.replace("_", "-")) == why, name
