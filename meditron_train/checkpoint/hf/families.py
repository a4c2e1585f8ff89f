"""The families of models: how `config.json` names them, what it says that a Llama's does not, transformers' defaults.

Their tensors are the rows of `tensor_map.LAYER_ROWS`. All share Llama's block (RMSNorm, RoPE, grouped-query attention,
SwiGLU); Mistral adds a sliding window, Qwen2 a bias on query, key and value and a window on its later layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meditron_train.config.model_config import Family, ModelConfig
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class HFFamily:
    """One family as transformers knows it.

    Attributes:
        defaults: what its configuration class assumes for keys that a file leaves out.
    """

    name: Family
    architecture: str
    model_type: str
    defaults: Mapping[str, Any]


_LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Sources of the defaults: LlamaConfig, MistralConfig and Qwen2Config of transformers.
FAMILIES = (
    HFFamily("llama", "LlamaForCausalLM", "llama", _LLAMA_DEFAULTS),
    HFFamily(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        {
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    HFFamily(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "bos_token_id": None,
            "eos_token_id": None,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
)


def find_family(config: Mapping[str, Any], where: str) -> HFFamily:
    """The family that `model_type` names, as in transformers, or without it `architectures`.

    The name in `architectures` varies between the programs that write it (LLaMAForCausalLM,
    FSDPLlamaForCausalLM): it only has to be one of the family; the tensors decide the rest.

    Raises:
        UserError: the family is not supported; the message lists those that are.
    """
    known = ", ".join(f"{family.architecture} (model_type {family.model_type!r})" for family in FAMILIES)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: architectures = {architectures!r}: must be a list of names")
    model_type = config.get("model_type")
    if not architectures and not model_type:
        raise UserError(f"{where}: neither architectures nor model_type is there. Supported: {known}")
    if not model_type:
        named = architectures[0].lower().removeprefix("fsdp")
        for family in FAMILIES:
            if named == family.architecture.lower():
                return family
        raise UserError(
            f"{where}: architecture {architectures[0]} is not supported. Supported: {known}. If it is another name "
            f"for one of these, add its model_type"
        )
    for family in FAMILIES:
        if model_type == family.model_type:
            _check_architecture(architectures, family, where)
            return family
    named = f" (architecture {architectures[0]})" if architectures else ""
    raise UserError(f"{where}: model_type {model_type!r}{named} is not supported. Supported: {known}")


def _check_architecture(architectures: list[str], family: HFFamily, where: str) -> None:
    found, expected = architectures[0] if architectures else None, family.architecture
    if found is None or found.lower().removeprefix("fsdp") == expected.lower():
        return
    if expected.lower() not in found.lower():
        raise UserError(
            f"{where}: architecture {found} is not supported with model_type {family.model_type!r}, which wants "
            f"{expected}. If the model is one, write that"
        )
    _log.warning("%s: architecture %s is read as %s, as transformers does", where, found, expected)


def read_window(
    family: HFFamily, value: Mapping[str, Any], num_layers: int, where: str
) -> tuple[int | None, int]:
    """(sliding_window, num_full_attention_layers) of a config with its defaults filled in.

    transformers ignores these keys in a Llama, and Qwen2's unless `use_sliding_window` is true; so they do
    here.
    `layer_types`, which 5.x writes, must say the same.

    Raises:
        UserError: `layer_types` says something else than the window.
    """
    window, num_full = value.get("sliding_window"), 0
    if family.name == "llama" or (family.name == "qwen2" and not value["use_sliding_window"]):
        window = None
    elif family.name == "qwen2" and window is not None:
        num_full = value["max_window_layers"]
    stated = value.get("layer_types") if family.name != "llama" else None
    derived = _layer_types(window, num_full, num_layers)
    if stated is not None and stated != derived:
        raise UserError(
            f"{where}: layer_types = {stated!r} is not what sliding_window and max_window_layers say ({derived!r}). "
            f"Only a window on all layers, or on all after the first max_window_layers, is supported"
        )
    return window, num_full


def family_keys(model: ModelConfig) -> dict[str, Any]:
    """What `config.json` holds for the model's family beyond the keys that all families share."""
    family = family_of(model)
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    if model.family == "llama":
        return {
            **named,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "head_dim": model.head_dim,
        }
    if model.family == "mistral":
        return {**named, "sliding_window": model.sliding_window, "head_dim": model.head_dim}
    window, num_full = model.sliding_window, model.num_full_attention_layers
    keys = {
        **named,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # Without a window no layer has one, and vLLM asks for all layers here.
        "max_window_layers": num_full if window is not None else model.num_layers,
        "layer_types": _layer_types(window, num_full, model.num_layers),
    }
    if model.head_dim * model.num_heads != model.hidden_size:  # Qwen2Config has no such key of its own
        keys["head_dim"] = model.head_dim
    return keys


def family_of(model: ModelConfig) -> HFFamily:
    return next(family for family in FAMILIES if family.name == model.family)


def _layer_types(window: int | None, num_full: int, num_layers: int) -> list[str]:
    """transformers 5.x's word for each layer."""
    return [
        "sliding_attention" if window is not None and layer >= num_full else "full_attention"
        for layer in range(num_layers)
    ]
