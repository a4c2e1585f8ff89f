"""Sharded checkpoints: megatron-core loads ours, we read megatron-core's, damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from meditron_train.checkpoint.sharded import plan as sharded_plan
from meditron_train.checkpoint.sharded.plan import meta_json, plan_distcp, write_index
from meditron_train.checkpoint.sharded.read import ShardedSource, is_sharded_directory, read_meta
from meditron_train.checkpoint.tensor_map import rank_slice, tensor_specs
from tests.checkpoint.planned import planned, write_planned
from tests.checkpoint.test_tensor_map import make_model, random_source
from tests.checkpoint.tiny_llama import assert_same_bits, change_json
from tests.checkpoint.whole import to_megatron
from tests.distributed import run_ranks
from tests.refusal import refused


def write_checkpoint(directory: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A random model as a sharded checkpoint; returns its tensors."""
    model = make_model()
    source, padded = random_source(model, dtype), model.padded_vocab_size(1)
    tensors = {spec.name: to_megatron(spec, source.tensors, padded) for spec in tensor_specs(model)}
    directory.mkdir()
    files = plan_distcp(planned(tensors))
    write_planned(directory, files, tensors)
    write_index(directory, files)
    (directory / "meta.json").write_text(json.dumps(meta_json(model, padded, step=7)))
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_reads_what_it_wrote(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sharded_plan, "_MAX_FILE_BYTES", 10_000)
    tensors = write_checkpoint(tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) > 2
    source = ShardedSource(tmp_path / "checkpoint")
    assert source.names == list(tensors)
    assert (source.meta["step"], source.padded_vocab_size, source.model) == (7, 256, make_model())
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == torch.bfloat16
        assert_same_bits(source.read(name), tensor, name)


def _mcore_load(rank: int, world_size: int, directory: str) -> bool:
    """Every tensor split over two ranks as tensor parallelism does, loaded by megatron-core from our files."""
    from meditron_train import mcore

    torch.distributed.init_process_group("gloo")
    model = make_model()
    source, padded = random_source(model, torch.bfloat16), model.padded_vocab_size(1)
    state = {}
    for spec in tensor_specs(model):
        shape = list(spec.padded_shape(padded))
        offsets = []
        if spec.tp_dim is not None:
            shape[spec.tp_dim] //= world_size
            offsets = [(spec.tp_dim, rank, world_size)]
        empty = torch.empty(shape, dtype=torch.bfloat16)
        replica = 0 if offsets else rank
        state[spec.name] = mcore.ShardedTensor.from_rank_offsets(
            spec.name, empty, *offsets, replica_id=replica
        )
    loaded = mcore.dist_checkpointing.load(state, directory, strict=mcore.StrictHandling.RAISE_ALL)
    for spec in tensor_specs(model):
        if spec.kind == "gate_up":  # split in halves of the whole here, not of each part
            want = to_megatron(spec, source.tensors, padded).chunk(world_size)[rank]
        else:
            want = rank_slice(spec, source, tp_rank=rank, tp_size=world_size, padded_vocab_size=padded)
        assert torch.equal(loaded[spec.name], want), spec.name
    return True


def test_megatron_core_loads_what_is_written(checkpoint: Path) -> None:
    assert run_ranks(_mcore_load, 2, str(checkpoint)) == [True, True]


def _mcore_save(rank: int, world_size: int, directory: str) -> bool:
    """A model and optimizer state saved by megatron-core, tensors split over the ranks along their tp_dim."""
    from meditron_train import mcore

    torch.distributed.init_process_group("gloo")
    model = make_model()
    source, padded = random_source(model, torch.bfloat16), model.padded_vocab_size(world_size)
    state = {"step": 3}
    for spec in tensor_specs(model):
        whole = to_megatron(spec, source.tensors, padded)
        split = () if spec.tp_dim is None else ((spec.tp_dim, rank, world_size),)
        part = whole if spec.tp_dim is None else whole.chunk(world_size, dim=spec.tp_dim)[rank].contiguous()
        replica = 0 if split else rank
        tensor = mcore.ShardedTensor.from_rank_offsets(spec.name, part, *split, replica_id=replica)
        state[spec.name] = tensor
        moment = mcore.ShardedTensor.from_rank_offsets(
            f"optimizer.state.exp_avg.{spec.name}", part.float(), *split, replica_id=replica
        )
        state[f"moment.{spec.name}"] = moment
    state["rng"] = mcore.ShardedObject("rng_state", {"seed": 1}, (1,), (0,), replica_id=rank)
    mcore.dist_checkpointing.save(state, directory)
    return True


def test_reads_what_megatron_core_saved(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    directory.mkdir()
    run_ranks(_mcore_save, 2, str(directory))
    model = make_model()
    tensors, padded = random_source(model, torch.bfloat16).tensors, model.padded_vocab_size(2)
    (directory / "meta.json").write_text(json.dumps(meta_json(model, padded)))
    source = ShardedSource(directory)
    assert any(name.startswith("optimizer.") for name in source.all_names)
    assert not any(name.startswith("optimizer.") for name in source.names)
    for spec in tensor_specs(model):
        assert_same_bits(source.read(spec.name), to_megatron(spec, tensors, padded), spec.name)
    assert len(source.place("decoder.layers.0.mlp.linear_fc2.weight")) == 2


def test_missing_and_cut_off_files_are_named(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with refused("not an intact checkpoint", "__0_0.distcp is cut off"):
        ShardedSource(checkpoint)
    file.unlink()
    with refused("__0_0.distcp is missing"):
        ShardedSource(checkpoint)
    (checkpoint / ".metadata").unlink()
    with refused(".metadata is missing", "hidden files"):
        ShardedSource(checkpoint)
    assert is_sharded_directory(checkpoint)


def test_a_damaged_record_is_named(checkpoint: Path) -> None:
    source = ShardedSource(checkpoint)
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with refused("__0_0.distcp", "decoder.final_layernorm.weight cannot be read"):
        source.read("decoder.final_layernorm.weight")
    with refused("no tensor nothing.weight"):
        source.read("nothing.weight")


def test_meta_json_must_fit(checkpoint: Path) -> None:
    meta = read_meta(checkpoint)
    change_json(checkpoint / "meta.json", model={**meta["model"], "num_layers": 3})
    with refused("decoder.layers.2.input_layernorm.weight is missing"):
        ShardedSource(checkpoint)
    change_json(checkpoint / "meta.json", model={**meta["model"], "hidden_size": 48})
    with refused("has shape [256, 24], meta.json says [256, 48]", "and "):
        ShardedSource(checkpoint)
    change_json(checkpoint / "meta.json", model={"hidden_size": 48})
    with refused("meta.json does not describe a model"):
        ShardedSource(checkpoint)
    change_json(checkpoint / "meta.json", format="another")
    with refused('does not say "format": "meditron-train/1"'):
        read_meta(checkpoint)
    (checkpoint / "meta.json").write_text("{")
    with refused("not valid JSON"):
        read_meta(checkpoint)
    (checkpoint / "meta.json").unlink()
    with refused("meta.json does not exist", "not a finished checkpoint"):
        read_meta(checkpoint)
    (checkpoint / "checkpoints" / "step_00000020").mkdir(parents=True)
    (checkpoint / "checkpoints" / "step_00000020" / "meta.json").touch()
    with refused("Did you mean", "checkpoints/step_00000020?"):
        read_meta(checkpoint)
    with refused("never finished"):
        read_meta(checkpoint.with_suffix(".tmp"))


def test_metadata_with_code_is_refused_and_not_run(checkpoint: Path) -> None:
    marker = checkpoint / "was_run"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with refused(".metadata: the pickle refers to io.open, which is not allowed", "Refused"):
        ShardedSource(checkpoint)
    assert not marker.exists()
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"not": "metadata"}))
    with refused(".metadata cannot be read: it is not a Metadata"):
        ShardedSource(checkpoint)


def test_metadata_that_names_a_file_elsewhere_is_refused(checkpoint: Path) -> None:
    raw = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(raw.replace(b"__0_0.distcp", b"../../passwd"))
    with refused("'../../passwd', outside the directory"):
        ShardedSource(checkpoint)


def test_metadata_with_an_endless_file_name_is_refused(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "9" * 5000
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused(".metadata cannot be read", "a name of 5000 characters"):
        ShardedSource(checkpoint)
