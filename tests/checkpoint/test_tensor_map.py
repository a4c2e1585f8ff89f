"""The tensor table: both directions undo each other, rank slices tile the whole, and the layout is megatron-core's."""

from __future__ import annotations

import pytest
import torch

from meditron_train.checkpoint.tensor_map import (
    TensorSpec,
    check_source,
    hf_shapes,
    rank_slice,
    tensor_specs,
)
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from tests.checkpoint.whole import to_hf, to_megatron


def make_model(**changes) -> ModelConfig:
    sizes = dict(
        vocab_size=131, hidden_size=24, intermediate_size=36, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=6,
        max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


class MemorySource:
    """A Hugging Face source in memory that counts the elements it hands out."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.num_elements_read = tensors, 0

    @property
    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, rows=None, columns=None):
        part = self.tensors[name][slice(*rows) if rows else slice(None)]
        part = part[:, slice(*columns)] if columns else part
        self.num_elements_read += part.numel()
        return part.clone()


def random_source(model: ModelConfig, dtype=torch.float32) -> MemorySource:
    generator = torch.Generator().manual_seed(1)
    return MemorySource(
        {n: torch.randn(s, generator=generator).to(dtype) for n, s in hf_shapes(model).items()}
    )


def find(model: ModelConfig, name: str) -> TensorSpec:
    return next(spec for spec in tensor_specs(model) if spec.name == name)


@pytest.mark.parametrize("num_kv_heads", [8, 4, 1])
@pytest.mark.parametrize("tie", [False, True])
def test_there_and_back(num_kv_heads: int, tie: bool) -> None:
    model = make_model(num_kv_heads=num_kv_heads, tie_embeddings=tie)
    source, padded = random_source(model, torch.bfloat16), model.padded_vocab_size(1)
    back = {}
    for spec in tensor_specs(model):
        whole = to_megatron(spec, source.tensors, padded)
        assert tuple(whole.shape) == spec.padded_shape(padded)
        assert torch.equal(whole, rank_slice(spec, source, padded_vocab_size=padded))
        back |= to_hf(spec, whole)
    assert back.keys() == source.tensors.keys()
    assert all(
        torch.equal(back[name], tensor) and back[name].is_contiguous()
        for name, tensor in source.tensors.items()
    )


@pytest.mark.parametrize("tp_size", [2, 4])
def test_rank_slices_hold_each_element_once(tp_size: int) -> None:
    model = make_model()
    source, padded = random_source(model), model.padded_vocab_size(tp_size)
    for spec in tensor_specs(model):
        slices = [
            rank_slice(spec, source, tp_rank=r, tp_size=tp_size, padded_vocab_size=padded)
            for r in range(tp_size)
        ]
        whole = to_megatron(spec, source.tensors, padded)
        if spec.kind == "gate_up":  # each rank: its gate rows, then its up rows
            gates, ups = zip(*(part.chunk(2) for part in slices), strict=True)
            assert torch.equal(torch.cat([*gates, *ups]), whole)
        elif spec.tp_dim is None:
            assert all(torch.equal(part, whole) for part in slices)
        else:
            assert torch.equal(torch.cat(slices, dim=spec.tp_dim), whole)


def test_a_rank_reads_only_its_part() -> None:
    model = make_model()
    source = random_source(model)
    for name in (
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
    ):
        spec = find(model, f"decoder.layers.1.{name}.weight")
        source.num_elements_read = 0
        part = rank_slice(spec, source, tp_rank=1, tp_size=2, padded_vocab_size=256)
        assert source.num_elements_read == part.numel() == torch.Size(spec.shape).numel() // 2


def test_query_key_value_rows_are_interleaved_per_kv_head() -> None:
    model = make_model(num_heads=4, num_kv_heads=2, head_dim=2)
    spec = find(model, "decoder.layers.0.self_attention.linear_qkv.weight")
    row = lambda letter, n: torch.tensor([[float(100 * "qkv".index(letter) + i)] * 24 for i in range(n)])  # noqa: E731
    tensors = {name: row(name[-13], n) for name, n in zip(spec.hf_names, (8, 4, 4), strict=True)}
    got = [int(x) for x in to_megatron(spec, tensors, 128)[:, 0]]
    assert got == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_vocabulary_padding_is_zero_on_every_rank() -> None:
    model = make_model(vocab_size=131)
    source, spec = random_source(model), find(model, "output_layer.weight")
    slices = [rank_slice(spec, source, tp_rank=r, tp_size=4, padded_vocab_size=512) for r in range(4)]
    assert [int(s.any(dim=1).sum()) for s in slices] == [128, 3, 0, 0]


def test_tied_models_have_no_output_layer() -> None:
    assert "output_layer.weight" not in {spec.name for spec in tensor_specs(make_model(tie_embeddings=True))}


def test_uneven_splits_and_wrong_shapes_are_refused() -> None:
    model = make_model(num_heads=6, num_kv_heads=3)
    source = random_source(model)
    qkv = find(model, "decoder.layers.0.self_attention.linear_qkv.weight")
    with pytest.raises(UserError, match="3 KV heads cannot be split over 2"):
        rank_slice(qkv, source, tp_rank=0, tp_size=2, padded_vocab_size=256)
    fc1 = find(model, "decoder.layers.0.mlp.linear_fc1.weight")
    with pytest.raises(UserError, match="36 rows cannot be split over 5"):
        rank_slice(fc1, source, tp_rank=0, tp_size=5, padded_vocab_size=256)
    with pytest.raises(UserError, match="fewer than the 131"):
        rank_slice(find(model, "output_layer.weight"), source, padded_vocab_size=128)
    source.tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 4)
    with pytest.raises(UserError, match=r"k_proj.weight has shape \[4, 4\]; the config says \[18, 24\]"):
        rank_slice(qkv, source, padded_vocab_size=256)


def test_check_source_lists_every_problem_at_once() -> None:
    model = make_model()
    source = random_source(model)
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    check_source(source, model, "DIR")
    del source.tensors["lm_head.weight"]
    source.tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)
    source.tensors["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(UserError) as error:
        check_source(source, model, "DIR")
    for part in (
        "DIR: missing tensors: lm_head.weight",
        "lora_A",
        "merge them",
        "model.norm.weight has shape [7]",
    ):
        assert part in str(error.value)


def test_check_source_takes_a_tied_head_or_none() -> None:
    model = make_model(tie_embeddings=True)
    source = random_source(model)
    check_source(source, model, "DIR")
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    check_source(source, model, "DIR")
