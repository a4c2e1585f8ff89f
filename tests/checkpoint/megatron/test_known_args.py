"""No argument in a checkpoint of Megatron passes unread: each is used, harmless, or refused by name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from meditron_train.checkpoint.megatron.args import model_from_args
from meditron_train.checkpoint.megatron.known_args import HARMLESS, REFUSED, USED, check_args, is_known
from meditron_train.mcore import TransformerConfig
from tests.checkpoint.megatron.argument_names import (
    MEGATRON_LLM,
    MEGATRON_LM_0_16,
    MEGATRON_LM_2026,
    MEGATRON_LM_OLDER,
)
from tests.refusal import refused

ARGS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 80, "swiglu": True,
    "max_position_embeddings": 64, "vocab_size": 131, "normalization": "RMSNorm", "position_embedding_type": "rope",
}  # fmt: skip


def model_of(**changes: Any) -> Any:
    return model_from_args({**ARGS, **changes}, None, "float32", "iter_0000010")


@pytest.mark.parametrize(
    "names",
    [MEGATRON_LM_0_16, MEGATRON_LM_2026, MEGATRON_LM_OLDER, MEGATRON_LLM],
    ids=["0.16", "2026", "older", "Megatron-LLM"],
)
def test_every_argument_of_a_program_is_in_one_class(names: list[str]) -> None:
    assert len(names) > 20
    assert [name for name in names if not is_known(name)] == []


def test_every_field_of_megatron_core_s_config_is_in_one_class() -> None:
    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    assert [name for name in names if not is_known(name)] == []
    assert not USED & REFUSED and not HARMLESS & (USED | REFUSED)


@pytest.mark.parametrize(
    "change",
    [
        {"no_rope_freq": [0, 0, 0, 1]},
        {"softmax_type": "off-by-one"},
        {"position_embedding_type": "none"},
        {"position_embedding_type": "yarn"},
        {"position_embedding_type": SimpleNamespace(arguments=(2,))},  # Megatron-LLM's enumeration: absolute
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"heterogeneous_layers_config_path": "layers.json"},
        {"qk_l2_norm": True},
        {"use_mup": True},
        {"attention_output_gate": True},
        {"mtp_num_layers": 1},
        {"spec": ["my.module", "my_spec"]},
        {"quick_geglu": True},
        {"model_name": "falcon"},
        {"rope_type": "yarn"},
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(change: dict[str, Any]) -> None:
    name = next(iter(change))
    with refused("iter_0000010", name, "no Llama, Mistral or Qwen2.5"):
        model_of(**change)
    # A configuration of the user's does not make another model of it.
    with refused(name):
        check_args({**ARGS, **change}, "iter_0000010", "", described=True)


def test_values_that_switch_nothing_on_are_fine() -> None:
    plain = model_of()
    assert model_of(glu_linear_offset=0.0, softmax_type="vanilla", mtp_num_layers=None, spec=None) == plain
    assert model_of(position_embedding_type=SimpleNamespace(arguments=(1,))) == plain
    assert model_of(moe_router_topk=2, mup_width_mult=1.0, log_interval=100, wandb_project="x") == plain


def test_an_unknown_argument_is_refused_unless_it_asks_for_nothing() -> None:
    with refused("residual_gate = 0.5", "Give --config DIR"):
        model_of(residual_gate=0.5)
    assert model_of(residual_gate=0.0, gates=[], gate_path=None, use_gates=False) == model_of()
    check_args({**ARGS, "residual_gate": 0.5}, "here", "", described=True)


def test_an_interpolation_that_megatron_core_never_saw_is_asked_for() -> None:
    with refused("rotary_seq_len_interpolation_factor = 4", "--config DIR"):
        model_of(rotary_seq_len_interpolation_factor=4)
    assert model_of(rotary_seq_len_interpolation_factor=1).rope.kind == "default"
    old = model_of(rotary_seq_len_interpolation_factor=4, use_legacy_models=True)
    assert (old.rope.kind, old.rope.factor) == ("linear", 4.0)
