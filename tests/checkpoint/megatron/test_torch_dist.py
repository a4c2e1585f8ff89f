"""`torch_dist` checkpoints as Megatron-LM writes them: made by megatron-core's own GPTModel, which runs them too."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.megatron.rank_files import load_megatron_pickle
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource, is_megatron_directory
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.checkpoint.tensor_map import tensor_specs
from tests.checkpoint.megatron.fixtures import lm_args
from tests.checkpoint.megatron.test_bridge import write as write_run_config
from tests.checkpoint.megatron.test_rank_files import Evil, assert_gives, make_hf
from tests.checkpoint.tiny_tokenizer import write_tokenizer_model
from tests.checkpoint.whole import to_hf
from tests.distributed import run_ranks
from tests.long import mostly_long
from tests.refusal import refused

IDS = (torch.arange(40) * 7 % 131)[None]


def save_ranks(
    rank: int, world_size: int, hf: str, args: dict[str, Any], directory: str, layout: dict[str, Any]
) -> torch.Tensor | None:
    """Save a stock GPTModel with the weights of a Hugging Face model; returns its logits where it has one stage."""
    from meditron_train.checkpoint.hf.read import open_hf_model
    from meditron_train.checkpoint.tensor_map import rank_slice
    from meditron_train.layout import ParallelLayout
    from meditron_train.mcore import GPTModel, ShardedObject, dist_checkpointing, get_gpt_layer_local_spec
    from meditron_train.model import transformer_config
    from meditron_train.parallel import initialize

    tp, pp = layout["tp"], layout["pp"]
    parallel = ParallelLayout(world_size=world_size, tensor=tp, pipeline=pp)
    mesh = initialize(parallel, rank=rank, local_rank=rank, device="cpu", timeout_s=60)
    model, source = open_hf_model(hf)
    padded = model.padded_vocab_size(tp)
    config = transformer_config(model, parallel, dtype=torch.float32)
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        padded,
        model.max_position_embeddings,
        pre_process=mesh.at.pipeline == 0,
        post_process=mesh.at.pipeline == pp - 1,
        parallel_output=False,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope.theta,
        pg_collection=mesh.groups,
    )
    specs = {spec.name: spec for spec in tensor_specs(model)}
    first = mesh.at.pipeline * model.num_layers // pp
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            head, layers, rest = name.partition("decoder.layers.")
            if layers:
                number, _, rest = rest.partition(".")
                name = f"{head}{layers}{first + int(number)}.{rest}"
            if name == "output_layer.weight" and model.tie_embeddings:
                name = "embedding.word_embeddings.weight"
            part = rank_slice(
                specs[name], source, tp_rank=mesh.at.tensor, tp_size=tp, padded_vocab_size=padded
            )
            parameter.copy_(part)
    metadata = {"non_homogeneous_layers": layout["per_layer"]}
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 500,
        "model": gpt.sharded_state_dict(metadata=metadata),
        "rng_state": ShardedObject("rng_state", [{"seed": 1}], (pp, tp), (mesh.at.pipeline, mesh.at.tensor)),
    }
    dist_checkpointing.save(state, directory)
    if pp > 1:
        return None
    length = IDS.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.inference_mode():
        return gpt(IDS, torch.arange(length)[None], mask)[..., : model.vocab_size].clone()


CASES: dict[str, tuple[dict, dict]] = {
    "tp2, one tensor for all layers": ({}, {"tp": 2, "pp": 1, "per_layer": False}),
    "tp2-pp2, one tensor for all layers": ({}, {"tp": 2, "pp": 2, "per_layer": False}),
    "pp2, tied, a tensor per layer": ({"tie_word_embeddings": True}, {"tp": 1, "pp": 2, "per_layer": True}),
    "tp2, Qwen2.5": ({"model_type": "qwen2"}, {"tp": 2, "pp": 1, "per_layer": False}),
}


def make_run(tmp_path: Path, changes: dict, layout: dict) -> tuple[Path, dict, list]:
    tensors, config = make_hf(tmp_path / "hf", num_hidden_layers=2, **changes)
    directory = tmp_path / "run" / "iter_0000500"
    directory.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("500")
    world_size = layout["tp"] * layout["pp"]
    args = lm_args(config, vocab_size=131)
    logits = run_ranks(save_ranks, world_size, str(tmp_path / "hf"), args, str(directory), layout)
    return tmp_path / "run", tensors, logits


QUICK = ("tp2, one tensor for all layers", "pp2, tied, a tensor per layer")


@pytest.mark.parametrize("case", mostly_long(CASES, *QUICK))
def test_what_megatron_core_saves_is_read(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    changes, layout = CASES[case]
    run, tensors, logits = make_run(tmp_path, changes, layout)
    assert is_megatron_directory(run) and is_megatron_directory(run / "iter_0000500")
    names = json.loads((run / "iter_0000500" / "metadata.json").read_text())
    assert names["sharded_backend"] == "torch_dist"
    source = MegatronSource(run)
    assert source.iteration == 500
    assert_gives(source, tensors)
    same = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    assert source.model == read_hf_config(tmp_path / "hf").model_copy(update=same)
    if (
        layout["pp"] == 1
    ):  # the stock model computed what transformers computes from the tensors that were read
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        read = {n: t for s in tensor_specs(source.model) for n, t in to_hf(s, source.read(s.name)).items()}
        model.load_state_dict(read, strict=not source.model.tie_embeddings)
        with torch.inference_mode():
            want = model(IDS).logits
        assert want.std() > 0.1
        assert (logits[0] - want).abs().max() < 1e-5


def test_damage_and_code(tmp_path: Path) -> None:
    run, _, _ = make_run(tmp_path, {}, {"tp": 1, "pp": 1, "per_layer": False})
    common = run / "iter_0000500" / "common.pt"
    whole = common.read_bytes()
    content = torch.load(common, weights_only=False)
    torch.save({**content, "args": Evil()}, common)
    with refused("common.pt: the pickle refers to posix.system", "Refused"):
        MegatronSource(run)
    del content["args"]
    torch.save(content, common)
    with refused("holds no arguments that describe the model", "--config DIR"):
        MegatronSource(run)
    assert MegatronSource(run, MegatronOptions(config=tmp_path / "hf")).model.num_layers == 2
    common.write_bytes(whole)
    lost = next((run / "iter_0000500").glob("*.distcp"))
    lost.write_bytes(lost.read_bytes()[:-1000])
    with refused(f"{lost.name} is cut off"):
        MegatronSource(run)
    lost.unlink()
    with refused(f"{lost.name} is missing"):
        MegatronSource(run)


def move_common_state(iteration: Path) -> None:
    """From common.pt to where megatron-core keeps it since 0.19: an object among the tensors, a list of the state."""
    raw = io.BytesIO()
    torch.save([torch.load(iteration / "common.pt", weights_only=False)], raw)
    metadata = read_metadata(iteration)
    file = next(iter(metadata.storage_data.values())).relative_path
    place = _StorageInfo(file, (iteration / file).stat().st_size, len(raw.getvalue()))
    with (iteration / file).open("ab") as out:
        out.write(raw.getvalue())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    (iteration / "common.pt").unlink()
    (iteration / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )


def test_other_layouts_of_torch_dist(tmp_path: Path) -> None:
    run, tensors, _ = make_run(tmp_path, {}, {"tp": 2, "pp": 1, "per_layer": False})
    iteration = run / "iter_0000500"
    move_common_state(iteration)
    assert_gives(MegatronSource(run), tensors)
    (iteration / "hf").mkdir()  # Megatron-Bridge puts more beside the tensors
    (iteration / "tokenizer").mkdir()
    write_tokenizer_model(iteration / "tokenizer")
    assert is_megatron_directory(iteration)
    options = MegatronOptions(vocab_size=131)
    source = MegatronSource(iteration, options)
    assert source.tokenizer == iteration / "tokenizer"
    nemo = tmp_path / "nemo" / "weights"
    shutil.copytree(iteration, nemo)
    assert is_megatron_directory(nemo.parent)
    assert_gives(MegatronSource(nemo.parent, options), tensors)
    shutil.rmtree(nemo / "tokenizer")
    for place in (nemo.parent / "context" / "nemo_tokenizer", nemo.parent / "tokenizer"):
        place.mkdir(parents=True)
        write_tokenizer_model(place)
        for given in (nemo.parent, nemo)[: 1 if place.name == "tokenizer" else 2]:
            assert MegatronSource(given, options).tokenizer == place
        shutil.rmtree(place)
    assert MegatronSource(nemo.parent, options).tokenizer is None
    metadata = read_metadata(iteration)
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if not k.fqn.startswith("common")}
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("common.pt is missing, and .metadata names no common_state"):
        MegatronSource(iteration, options)


def test_run_config_yaml_takes_the_place_of_missing_arguments(tmp_path: Path) -> None:
    run, tensors, _ = make_run(tmp_path, {}, {"tp": 1, "pp": 1, "per_layer": False})
    iteration = run / "iter_0000500"
    want = MegatronSource(run).model
    content = torch.load(iteration / "common.pt", weights_only=False)
    del content["args"]
    torch.save(content, iteration / "common.pt")
    shape = {
        "num_layers": want.num_layers, "hidden_size": want.hidden_size, "num_attention_heads": want.num_heads,
        "num_query_groups": want.num_kv_heads, "ffn_hidden_size": want.intermediate_size,
        "kv_channels": want.head_dim, "layernorm_epsilon": want.rms_norm_eps,
        "seq_length": want.max_position_embeddings, "rotary_base": int(want.rope.theta),
    }  # fmt: skip
    write_run_config(iteration, **shape)
    assert MegatronSource(run).model == want
    assert_gives(MegatronSource(run), tensors)
    write_run_config(iteration, **{**shape, "num_layers": 3})
    with refused("decoder.layers.2", "is missing"):
        MegatronSource(run)


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor"])
def test_other_formats_are_named(tmp_path: Path, backend: str) -> None:
    iteration = tmp_path / "iter_0000001"
    iteration.mkdir()
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    assert is_megatron_directory(iteration)
    with refused(f"is in the format {backend}", "torch_dist"):
        MegatronSource(iteration)


def test_names_as_python_3_11_2_writes_them(tmp_path: Path) -> None:
    """Under protocol 2 built-in names come from Python 2's module, members of enums by getattr, signals by name."""
    names = (
        "__builtin__\nbytes",
        "signal\nSIGTERM",
        "__builtin__\ngetattr",
        "megatron.core.enums\nModelType",
    )
    empty, signal, getattr_, model_type = (b"c" + name.encode() + b"\n" for name in names)
    member = getattr_ + model_type + b"X\x12\0\0\0encoder_or_decoder\x86R"
    values = ((b"iteration", b"K\x05"), (b"empty", empty + b")R"), (b"signal", signal), (b"type", member))
    items = b"".join(b"X" + bytes([len(key), 0, 0, 0]) + key + value for key, value in values)
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + items + b"u.")
    found = load_megatron_pickle(tmp_path / "common.pt")
    assert found["iteration"] == 5 and repr(found["type"]) == "<__builtin__.getattr>"
