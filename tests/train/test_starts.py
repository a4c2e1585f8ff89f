"""How runs begin and continue: every source of weights, every way to save, and what may change in between."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.manifest import write_manifest
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.train.test_failures import failure
from tests.train.test_loop import losses, run, run_rank, stop_file_after, tensors, weights

SHORT = {"steps": 6, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"}


@pytest.fixture
def write_short(write_config, tmp_path):
    """write_short(run_name, section={…}) → a run of 6 steps in tmp_path/run_name."""

    def write(run_name: str, **sections) -> Path:
        values = {
            "train": {**SHORT, **sections.pop("train", {})},
            "logging": {"run_dir": str(tmp_path / run_name), "wandb": "disabled", "tensorboard": False},
            **sections,
        }
        return write_config(f"{run_name}.yaml", **values)

    return write


@pytest.fixture
def reference_losses(write_short):
    return losses(run(write_short("reference")))


@pytest.mark.parametrize(
    "parallel", mostly_long([(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ("parallel.tensor=2",))
)
def test_a_converted_checkpoint_starts_like_its_source(
    write_short, hf_dir, tmp_path, reference_losses, parallel
):
    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded

    hf_to_sharded(hf_dir, tmp_path / "converted")
    config = write_short("from-converted", model={"from": str(tmp_path / "converted")})
    started = losses(run(config, *parallel, world_size=1 + len(parallel)))
    assert started == pytest.approx(reference_losses, rel=1e-5)


def test_a_damaged_checkpoint_starts_nothing(write_short, hf_dir, tmp_path):
    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded

    hf_to_sharded(hf_dir, tmp_path / "converted")
    config = write_short("from-damaged", model={"from": str(tmp_path / "converted")})
    data = tmp_path / "converted" / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert "__0_0.distcp has changed" in failure(config)
    (tmp_path / "converted" / "manifest.json").unlink()
    assert "manifest.json is missing" in failure(config, world_size=2)


@pytest.mark.long
@pytest.mark.parametrize("distributed_optimizer", ["true", "false"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_checkpoint_gives_its_weights_and_a_fresh_optimizer(
    write_short, tmp_path, distributed_optimizer, precision
):
    option = f"parallel.distributed_optimizer={distributed_optimizer}"
    train = {"precision": precision}
    run(write_short("first", train=train), option)
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000006"
    from meditron_train.checkpoint.convert.to_hf import export_hf

    export_hf(checkpoint, tmp_path / "exported")
    direct = run(write_short("direct", model={"from": str(checkpoint)}, train=train), option)
    by_way_of_hf = run(write_short("by-hf", model={"from": str(tmp_path / "exported")}, train=train), option)
    assert losses(direct) == losses(by_way_of_hf)  # and so not NaN, which equals nothing


@pytest.mark.long
def test_random_weights_do_not_depend_on_the_layout(write_short, tmp_path):
    from tests.train.reference import TINY

    model = {"from": None, "init": "random", "hf_config": {**TINY, "vocab_size": 300, "bos_token_id": 1}}
    one = run(write_short("one", model=model))
    four = run(write_short("four", model=model), "parallel.tensor=2", "parallel.pipeline=2", world_size=4)
    other_seed = run(write_short("other", model=model), "train.seed=7")
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert losses(other_seed)[0] != losses(one)[0]
    assert one[0]["loss"] == pytest.approx(5.7, abs=0.6)  # ln 300 = 5.70


def test_special_tokens_grow_the_embedding_by_its_mean_and_stay_in_the_export(write_short, hf_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = {"special_tokens": ["[bib_ref]", "[/bib_ref]", "<|im_start|>"]}
    train = {"steps": 1}
    optimizer = {"lr": 1.0e-30, "min_lr": 0.0, "weight_decay": 0.0}
    config = write_short(
        "special", data=data, train=train, optimizer=optimizer, schedule={"warmup_steps": 0},
        checkpoint={"export_hf": True},
    )  # fmt: skip
    run(config, "parallel.tensor=2", world_size=2)
    before = AutoModelForCausalLM.from_pretrained(hf_dir, dtype="float32")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "special" / "hf", dtype="float32")
    for old, new in (
        (before.model.embed_tokens.weight, after.model.embed_tokens.weight),
        (before.lm_head.weight, after.lm_head.weight),
    ):
        assert new.shape[0] == old.shape[0] + 3
        assert torch.equal(new[:-3], old)
        torch.testing.assert_close(new[-3:], old.mean(dim=0).expand(3, -1), rtol=0, atol=1e-7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "special" / "hf")
    assert tokenizer.encode("the [bib_ref] dose")[1:].count(300) == 1


@pytest.mark.long
def test_asynchronous_saves_change_nothing_and_resume(write_short, tmp_path, reference_losses):
    config = write_short("async", checkpoint={"interval": 2, "async_save": True, "export_hf": False})
    stop_file_after(config, tmp_path / "async", step=3, world_size=2)
    assert losses(run(config, world_size=2)) == pytest.approx(reference_losses, rel=1e-5)
    synchronous = write_short("sync", checkpoint={"interval": 2, "export_hf": False})
    run(synchronous, world_size=2)
    for step in (4, 6):
        name = f"checkpoints/step_{step:08d}"
        assert weights(tmp_path / "async" / name) == weights(tmp_path / "sync" / name)


@pytest.mark.long
def test_a_ramp_goes_on_where_it_was(write_short, tmp_path):
    train = {"global_batch_size": 8, "batch_ramp": {"start": 2, "increment": 2, "samples": 12}}
    whole = run(write_short("whole", train=train))
    config = write_short("ramp", train=train)
    stop_file_after(config, tmp_path / "ramp", step=3, world_size=1)
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    steps = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *whole], whole, strict=False)]
    assert steps[0] == 2 * 64 and steps[-1] == 8 * 64 and steps == sorted(steps)


def test_exports_on_the_way(write_short, tmp_path):
    run(write_short("exports", checkpoint={"interval": 100, "export_interval": 3, "export_hf": False}))
    for step in (3, 6):
        from meditron_train.checkpoint.hf.read import open_hf_model

        _, source = open_hf_model(tmp_path / "exports" / f"hf_step_{step:08d}")
        saved = tensors(tmp_path / "exports" / "checkpoints" / f"step_{step:08d}")
        assert torch.equal(source.read("model.norm.weight"), saved["decoder.final_layernorm.weight"])
    assert not (tmp_path / "exports" / "hf").exists()


def asking_rank(rank: int, world_size: int, config_file: Path, run_dir: Path) -> int:
    """Run; after step 2 somebody makes RUN_DIR/save."""
    from meditron_train.train import loop

    count = loop.Run.count

    def count_and_ask(self, number, result):
        count(self, number, result)
        if number == 2 and rank == 0:
            (run_dir / "save").touch()

    loop.Run.count = count_and_ask
    return run_rank(rank, world_size, config_file)


@pytest.mark.long
def test_a_save_file_saves_once_and_the_run_goes_on(write_short, tmp_path):
    config = write_short("asked", checkpoint={"interval": 100, "export_hf": False})
    assert run_ranks(asking_rank, 2, config, tmp_path / "asked") == [0, 0]
    names = sorted(entry.name for entry in (tmp_path / "asked" / "checkpoints").glob("step_*"))
    assert names == ["step_00000002", "step_00000006"]
    assert not (tmp_path / "asked" / "save").exists()


@pytest.mark.long
def test_changed_betas_take_effect_on_resume(write_short, tmp_path):
    config = write_short("betas")
    stop_file_after(config, tmp_path / "betas", step=3, world_size=1)
    shutil.copytree(tmp_path / "betas", tmp_path / "copy")
    same = run(config)
    changed = run(config, f"logging.run_dir={tmp_path / 'copy'}", "optimizer.betas=[0.5,0.5]")
    assert losses(same)[:4] == losses(changed)[:4]
    assert losses(same)[4:] != losses(changed)[4:]


def test_other_data_under_the_same_name_is_refused(write_short, corpus, tmp_path):
    for end in (".bin", ".idx"):
        shutil.copy(corpus / f"one{end}", tmp_path / f"mine{end}")
    data = {"train": [{"name": "mine", "path": str(tmp_path / "mine")}], "validation": []}
    config = write_short("data", data=data)
    stop_file_after(config, tmp_path / "data", step=2, world_size=1)
    for end in (".bin", ".idx"):
        shutil.copy(corpus / f"two{end}", tmp_path / f"mine{end}")
    assert "the training data, or a phase of data.phases that had begun, has changed" in failure(
        config, world_size=2
    )


def test_another_shape_under_the_same_keys_is_refused(write_short, tmp_path):
    from tests.train.reference import TINY

    hf_config = {key: value for key, value in TINY.items() if key != "rope_theta"} | {"vocab_size": 300}
    model = {"from": None, "init": "random", "hf_config": hf_config}
    stop_file_after(write_short("shape", model=model), tmp_path / "shape", step=2, world_size=1)
    model["hf_config"] = {**hf_config, "rope_theta": 5e5}
    assert "rope" in failure(write_short("shape", model=model))


def test_fewer_steps_than_are_done_are_refused(write_short):
    config = write_short("done")
    run(config)
    assert "step_00000006 is further than train.steps = 3" in failure(config, "train.steps=3")


@pytest.mark.long
def test_a_finished_run_started_again_only_exports(write_short, tmp_path):
    config = write_short("again")
    first = run(config)
    again = run(config, "checkpoint.export_hf=true")
    assert losses(again) == losses(first)
    assert (tmp_path / "again" / "hf" / "config.json").exists()


@pytest.mark.long
def test_a_renamed_checkpoint_is_not_taken_for_one(write_short, tmp_path, reference_losses):
    config = write_short("renamed")
    run(config)
    checkpoints = tmp_path / "renamed" / "checkpoints"
    (checkpoints / "step_00000006").rename(checkpoints / "step_00000006-bad")
    assert losses(run(config)) == reference_losses


def test_every_rank_learns_that_the_directory_is_in_use(write_short, tmp_path):
    from meditron_train.train.life.run_dir import RunDir

    with RunDir(tmp_path / "busy").locked():
        assert "is in use" in failure(write_short("busy"), world_size=2)


def no_memory_rank(rank: int, world_size: int, config_file: Path) -> str:
    from meditron_train.errors import MeditronError
    from meditron_train.train import dry_run

    def no_memory(engine, batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    dry_run.take_dry_step = no_memory
    with pytest.raises(MeditronError) as caught:
        run_rank(rank, world_size, config_file)
    return str(caught.value)


def test_too_little_memory_shows_in_the_dry_step(write_short, tmp_path):
    (message,) = run_ranks(no_memory_rank, 1, write_short("memory"))
    assert "Tried to allocate 2 GiB" in message and "train.micro_batch_size" in message
    assert not (tmp_path / "memory" / "metrics.jsonl").exists()


def dry_rank(rank: int, world_size: int, config: object) -> tuple[dict, dict, list]:
    """Weights before and after a dry step, and the losses of the steps that follow it."""
    from meditron_train.train.dry_run import invented_batch, take_dry_step
    from tests.train.ranks import local_weights, start_engine, take_steps
    from tests.train.reference import random_batch

    engine = start_engine(rank, world_size, config)
    before = local_weights(engine)
    take_dry_step(engine, [invented_batch(64, 1, 131)] * 4)
    after = local_weights(engine)
    steps = [[random_batch(10 * step + i) for i in range(8)] for step in range(3)]
    return before, after, [loss for loss, _ in take_steps(engine, steps)]


@pytest.mark.parametrize(
    "world_size, parallel",
    [pytest.param(1, {}, marks=pytest.mark.long), (2, {"pipeline": 2, "virtual_pipeline": 2})],
)
def test_a_dry_step_changes_nothing(tmp_path, world_size, parallel):
    from tests.train.ranks import make_config, train_ranks
    from tests.train.reference import hf_model, random_batch

    hf_model().save_pretrained(tmp_path / "hf")
    config = make_config(tmp_path / "hf", {"parallel": parallel, "optimizer": {"lr": 1e-3}})
    steps = [[random_batch(10 * step + i) for i in range(8)] for step in range(3)]
    expected = run_ranks(train_ranks, world_size, config, steps)
    for (before, after, seen), (history, _) in zip(
        run_ranks(dry_rank, world_size, config), expected, strict=True
    ):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert seen == [loss for loss, _ in history]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_size_of_a_checkpoint_is_known_before(write_short, tmp_path, hf_dir, precision):
    from meditron_train.checkpoint.hf.config import read_hf_config
    from meditron_train.config.load import load_config
    from meditron_train.planner.checkpoint_size import checkpoint_bytes

    config_file = write_short(
        "size", train={"steps": 1, "precision": precision}, schedule={"warmup_steps": 0}
    )
    run(config_file)
    written = sum(f.stat().st_size for f in (tmp_path / "size" / "checkpoints").glob("step_*/*.distcp"))
    predicted = checkpoint_bytes(load_config(config_file), read_hf_config(hf_dir))
    assert predicted < written < 1.5 * predicted  # padding and records weigh much in so small a model


class Touching:
    """Its pickle touches a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant(checkpoint: Path, where: str, marker: Path) -> None:
    """Code in one pickle of a checkpoint, and a manifest that fits."""
    if where == "rng":
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        for index, place in metadata.storage_data.items():
            if index.fqn.startswith("rng/"):
                file, raw = checkpoint / place.relative_path, io.BytesIO()
                torch.save(Touching(marker), raw)
                place.offset, place.length = file.stat().st_size, len(raw.getvalue())
                file.write_bytes(file.read_bytes() + raw.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "common.pt":
        torch.save({"optimizer": Touching(marker)}, checkpoint / where)
    else:
        (checkpoint / where).write_bytes(pickle.dumps(Touching(marker)))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def test_a_resume_runs_no_code_of_a_checkpoint(write_short, tmp_path):
    run(write_short("clean", checkpoint={"export_hf": False}))
    for where, said in (
        ("rng", "the record of rng/shard_0_1 refers to posix.system"),
        ("common.pt", "common.pt: the pickle refers to posix.system"),
        (".metadata", ".metadata: the pickle refers to posix.system"),
    ):
        shutil.copytree(tmp_path / "clean", tmp_path / where)
        config = write_short(where, checkpoint={"export_hf": False})
        plant(tmp_path / where / "checkpoints" / "step_00000006", where, tmp_path / "was_run")
        assert said in failure(config, "train.steps=8")
        assert not (tmp_path / "was_run").exists()


@pytest.mark.long
def test_one_rank_alone_hashes_the_checkpoint_that_a_run_starts_from(write_short, tmp_path, monkeypatch):
    """Which rank this is follows from the launcher: srun sets no RANK."""
    from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
    from meditron_train.config.load import load_config
    from meditron_train.errors import MeditronError
    from meditron_train.train.setup import make_plan

    monkeypatch.delenv("RANK", raising=False)
    hf_to_sharded(load_config(write_short("source")).model.from_, tmp_path / "sharded")
    config = load_config(write_short("hashed", model={"from": str(tmp_path / "sharded")}))
    shard = next((tmp_path / "sharded").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    make_plan(config, world_size=2, rank=1)
    with pytest.raises(MeditronError, match="is not an intact checkpoint"):
        make_plan(config, world_size=2, rank=0)


@pytest.mark.long
def test_a_base_with_nan_starts_only_on_purpose(write_short, hf_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(hf_dir, tmp_path / "broken")
    (broken / "manifest.json").unlink(missing_ok=True)
    stored = load_file(broken / "model.safetensors")
    stored["model.embed_tokens.weight"][0, 3] = float("nan")  # the row of a token that no document has
    save_file(stored, broken / "model.safetensors", metadata={"format": "pt"})
    config = write_short("nan", model={"from": str(broken)}, checkpoint={"export_hf": True})
    said = failure(config, world_size=2)
    assert f"{broken} holds NaN or infinity in embedding.word_embeddings.weight" in said
    assert "set model.allow_nonfinite=true" in said and not (tmp_path / "nan" / "hf").exists()
    run(config, "model.allow_nonfinite=true")
    assert (tmp_path / "nan" / "hf" / "model.safetensors").exists()
