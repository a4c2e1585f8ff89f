from __future__ import annotations

import logging

import pytest

from meditron_train.config.check import check_config, overwritten_inputs
from meditron_train.config.model_config import RopeConfig
from meditron_train.errors import UserError
from tests.config.shapes import LLAMA2, small_config

MODEL = LLAMA2["7b"].model_copy(
    update={
        "num_layers": 12,
        "num_heads": 8,
        "num_kv_heads": 4,
        "hidden_size": 64,
        "head_dim": 8,
        "intermediate_size": 96,
        "vocab_size": 1000,
        "max_position_embeddings": 256,
    }
)


def problems(world_size: int, **sections) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(small_config(**sections), MODEL, world_size, check_files=False)
    first, *listed = str(caught.value).splitlines()
    assert f"{len(listed)} problem" in first
    return [line.removeprefix("  - ") for line in listed]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (1, {"sequence": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (8, {"tensor": 2, "pipeline": 2, "context": 2}),
        (8, {"tensor": 2, "pipeline": 2, "sequence": True}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
)
def test_sound_layouts_pass(world_size, parallel):
    check_config(small_config(parallel=parallel), MODEL, world_size, check_files=False)


@pytest.mark.parametrize(
    ("world_size", "sections", "said"),
    [
        (6, {"parallel": {"tensor": 4}}, "world size 6 is not divisible"),
        (13, {"parallel": {"pipeline": 13}}, "12 layers are fewer than parallel.pipeline = 13 stages"),
        (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 4}}, "12 layers are not divisible by"),
        (
            1,
            {"parallel": {"virtual_pipeline": 2}},
            "parallel.virtual_pipeline is 2 but parallel.pipeline is 1",
        ),
        (8, {"parallel": {"tensor": 8}}, "4 key/value heads are not divisible by parallel.tensor = 8"),
        (3, {"parallel": {"tensor": 3}}, "8 attention heads are not divisible by parallel.tensor = 3"),
        (5, {"parallel": {"tensor": 5}}, "96 columns of the MLP"),
        (
            4,
            {"parallel": {"context": 4}, "train": {"seq_len": 250}},
            "500 tokens are not divisible by 2 x parallel.context",
        ),
        (
            4,
            {"parallel": {"tensor": 4, "sequence": True}, "train": {"seq_len": 255}},
            "not divisible by parallel.tensor = 4",
        ),
        (
            3,
            {},
            "16 is not divisible by train.micro_batch_size x data-parallel size = 2 x 3 = 6",
        ),
        (
            2,
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"global_batch_size": 6}},
            "3 micro-batches per rank, not divisible by parallel.pipeline = 2",
        ),
        (1, {"parallel": {"overlap_param_gather": True}}, "parallel.overlap_param_gather needs"),
        (
            1,
            {"optimizer": {"lr": 1e-5, "min_lr": 1e-4}},
            "optimizer.min_lr 0.0001 is above optimizer.lr 1e-05",
        ),
        (1, {"schedule": {"warmup_steps": 101}}, "the warm-up of 101 steps"),
        (1, {"schedule": {"warmup_steps": 50, "decay_steps": 40}}, "schedule.decay_steps 40 is below"),
        (
            1,
            {"schedule": {"kind": "wsd", "warmup_steps": 50, "decay_steps": 60}},
            "do not fit in train.steps 100",
        ),
    ],
)
def test_each_mistake_is_named(world_size, sections, said):
    found = problems(world_size, **sections)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ({"start": 32, "increment": 4, "samples": 100}, "train.batch_ramp.start 32 is above"),
        ({"start": 4, "increment": 5, "samples": 100}, "choose an increment that divides 12"),
        ({"start": 4, "increment": 6, "samples": 100}, "the train.batch_ramp stage of 10 is not divisible"),
    ],
)
def test_every_stage_of_the_ramp_is_checked(ramp, said):
    (problem,) = problems(2, train={"batch_ramp": ramp})
    assert said in problem


def test_a_sound_ramp_passes():
    ramp = {"start": 4, "increment": 4, "samples": 100}
    check_config(small_config(train={"batch_ramp": ramp}), MODEL, 2, check_files=False)


def test_all_mistakes_come_in_one_message():
    found = problems(
        6,
        parallel={"tensor": 8, "pipeline": 13},
        optimizer={"lr": 1e-5, "min_lr": 1e-4},
        schedule={"warmup_steps": 500},
    )
    for said in ("world size 6", "12 layers", "4 key/value heads", "optimizer.min_lr", "warm-up of 500"):
        assert any(said in problem for problem in found), said


def test_a_model_whose_files_are_missing_hides_no_other_mistake(tmp_path):
    config = small_config(model={"from": str(tmp_path / "model")}, optimizer={"lr": 1e-5, "min_lr": 1e-4})
    with pytest.raises(UserError) as caught:
        check_config(config, None, 3)
    for said in ("there is no directory", "global_batch_size 16", "optimizer.min_lr"):
        assert said in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding():
    config = small_config()
    check_config(config, MODEL, 1, tokenizer_vocab_size=1000, check_files=False)
    with pytest.raises(UserError) as caught:
        check_config(config, MODEL, 1, tokenizer_vocab_size=1001, check_files=False)
    # 1024 rows with padding could hold it, and must not
    assert "has 1001 tokens but the model's embedding has 1000 (1024 with padding" in str(caught.value)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("meditron_train"), "propagate", True)
    return caplog


def test_sequences_beyond_the_models_positions_warn(warnings):
    config = small_config(train={"seq_len": 512})
    check_config(config, MODEL, 1, check_files=False)
    assert "train.seq_len 512 is beyond the 256 positions" in warnings.text
    warnings.clear()
    dynamic = MODEL.model_copy(update={"rope": RopeConfig(kind="dynamic", factor=2.0)})
    check_config(config, dynamic, 1, check_files=False)
    assert warnings.text == ""


def test_a_warm_up_of_most_of_the_steps_warns(warnings):
    schedule = {"warmup_steps": 40}
    check_config(small_config(train={"steps": 80}, schedule=schedule), MODEL, 1, check_files=False)
    assert warnings.text == ""
    check_config(small_config(train={"steps": 79}, schedule=schedule), MODEL, 1, check_files=False)
    assert "the learning rate rises during 40 of the 79 steps" in warnings.text


def test_sequence_parallelism_without_tensor_parallelism_warns(warnings):
    check_config(small_config(parallel={"sequence": True}), MODEL, 1, check_files=False)
    assert "parallel.sequence has no effect" in warnings.text


def test_missing_files_are_named_one_by_one(tmp_path):
    config = small_config(
        model={"from": str(tmp_path / "model")},
        data={
            "tokenizer": str(tmp_path / "tokenizer"),
            "train": [{"name": "a", "path": str(tmp_path / "a.v2")}],
            "validation": [{"name": "b", "path": str(tmp_path / "b")}],
        },
    )
    with pytest.raises(UserError) as caught:
        check_config(config, MODEL, 1)
    message = str(caught.value)
    assert f"data.tokenizer: there is no directory {tmp_path}/tokenizer" in message
    assert f"model.from: there is no directory {tmp_path}/model" in message
    assert f"data.train 'a': missing {tmp_path}/a.v2.bin and {tmp_path}/a.v2.idx" in message
    assert f"data.validation 'b': missing {tmp_path}/b.bin" in message

    for directory in ("tokenizer", "model"):
        (tmp_path / directory).mkdir()
    for name in ("a.v2.bin", "a.v2.idx", "b.idx"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        check_config(config, MODEL, 1)
    message = str(caught.value)
    assert "has neither tokenizer.model nor tokenizer.json" in message
    assert "has neither config.json (Hugging Face) nor meta.json" in message
    assert "data.train" not in message
    assert f"data.validation 'b': missing {tmp_path}/b.bin;" in message

    (tmp_path / "tokenizer/tokenizer.json").touch()
    (tmp_path / "model/config.json").touch()
    (tmp_path / "b.bin").touch()
    check_config(config, MODEL, 1)


@pytest.mark.parametrize(
    ("run_dir", "said"),
    [
        ("llama", "contains model.from"),
        ("llama/hf", "is model.from"),
        ("llama/hf/run", "lies inside model.from"),
        ("link/hf", "is model.from"),
        ("link/hf/run", "lies inside model.from"),
        ("words", "is data.tokenizer"),
        ("words/run", "lies inside data.tokenizer"),
        ("run", None),
        ("llama2", None),
        ("texts", None),  # data beside what the run writes
        ("old", "old/hf contains it"),
        ("texts/medical.bin", "texts/medical.bin lies where the run writes"),
    ],
)
def test_a_run_never_writes_over_its_inputs(tmp_path, run_dir, said):
    for name in ("llama/hf", "words", "texts", "old/hf"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "llama")
    for name in ("texts/medical", "old/hf/more"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").touch()
    config = small_config(
        model={"from": str(tmp_path / "llama" / "hf")},
        data={
            "tokenizer": str(tmp_path / "words"),
            "train": [{"name": "medical", "path": str(tmp_path / "texts" / "medical")}],
            "validation": [{"name": "more", "path": str(tmp_path / "old" / "hf" / "more")}],
        },
        logging={"run_dir": str(tmp_path / run_dir)},
    )
    found = "\n".join(overwritten_inputs(config))
    assert (said in found and "give another logging.run_dir" in found) if said else not found
