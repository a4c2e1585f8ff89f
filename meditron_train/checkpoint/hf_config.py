"""Between a Hugging Face `config.json` and `ModelConfig`.

Reading takes what transformers 4.x wrote (`rope_theta`, `rope_scaling` with `type` or `rope_type`, `torch_dtype`) and
what 5.x writes (`rope_parameters`, `dtype`). Writing gives both spellings: transformers 4.57 silently ignores
`rope_parameters` and would compute other logits from a file written by 5.x alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meditron_train.checkpoint.families import HFFamily, family_keys, find_family, read_window
from meditron_train.config.model_config import ModelConfig, RopeConfig
from meditron_train.errors import UserError

SUPPORTED_ROPE_KINDS = ("default", "linear", "dynamic", "llama3")
DTYPES = ("float32", "bfloat16", "float16")

# The version whose keys are written; readers use it only to choose migrations, and the file carries both spellings.
TRANSFORMERS_VERSION = "4.57.1"

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
_OBJECTS = ("rope_parameters", "rope_scaling")


def read_hf_config(directory: str | Path) -> ModelConfig:
    """Read `directory/config.json`. Raises UserError when it is missing, not JSON, or not of a supported family."""
    return model_config_from_hf(load_config_json(directory), where=str(Path(directory) / "config.json"))


def load_config_json(directory: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a Hugging Face directory as a dict. Raises UserError when it cannot be had."""
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory. Give the path of a Hugging Face model on disk "
            f"(`hf download meta-llama/Llama-2-7b-hf --local-dir DIR` fetches one)."
        )
    if not path.is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = " It holds a LoRA adapter: merge it into its base model first (peft: merge_and_unload)."
        elif (directory / "params.json").is_file():
            hint = " It holds Meta's original release: use the repository whose name ends in -hf."
        raise UserError(f"{path} does not exist, so {directory} is not a Hugging Face model directory.{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(config).__name__}.")
    return config


def model_config_from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of a Hugging Face config dict (transformers 4.x or 5.x).

    Raises UserError, naming `where` and the key, for an unknown architecture, a missing key, or a feature that the
    model does not have (biases on other layers than its family's, other activations, other RoPE).
    """
    family = find_family(config, where)
    _check_types(config, where)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}. A {family.architecture} must state them.")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(
                f"{where}: {key} is true, but only Qwen2's query, key and value may have a bias here. "
                f"Only {key}: false is supported."
            )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are quantized (quantization_config). Use the unquantized model."
        )
    value = {**family.defaults, **config}
    if value["hidden_act"] != "silu":
        raise UserError(f"{where}: hidden_act is {value['hidden_act']!r}; nothing but 'silu' is supported.")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv_heads = value.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}."
        )
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(
            f"{where}: hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_heads}, "
            f"and head_dim is not given."
        )
    head_dim = config.get("head_dim") or hidden_size // num_heads
    if head_dim % 2:
        raise UserError(
            f"{where}: head_dim is {head_dim}: it must be even, as RoPE rotates pairs of its elements."
        )
    eos = value["eos_token_id"]
    try:
        return _build(
            family, value, num_kv_heads, head_dim, tuple(eos) if isinstance(eos, list) else eos, where
        )
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise UserError(f"{where}: {details}") from None


def _build(
    family: HFFamily, value: dict[str, Any], num_kv_heads: int, head_dim: int, eos: Any, where: str
) -> ModelConfig:
    num_layers = value["num_hidden_layers"]
    sliding_window, num_full_attention_layers = read_window(family, value, num_layers, where)
    return ModelConfig(
        family=family.name,
        vocab_size=value["vocab_size"],
        hidden_size=value["hidden_size"],
        intermediate_size=value["intermediate_size"],
        num_layers=num_layers,
        num_heads=value["num_attention_heads"],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=value["max_position_embeddings"],
        rms_norm_eps=value["rms_norm_eps"],
        rope=_read_rope(value, where),
        tie_embeddings=bool(value["tie_word_embeddings"]),
        sliding_window=sliding_window,
        num_full_attention_layers=num_full_attention_layers,
        initializer_range=value["initializer_range"],
        bos_token_id=value["bos_token_id"],
        eos_token_id=eos,
        pad_token_id=value["pad_token_id"],
        dtype=_read_dtype(value, where),
    )


def model_config_to_hf(model: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model: the keys transformers 5.x writes, and 4.x's spelling beside them.

    `dtype` is the dtype of the tensors that will lie beside the file ("float32", "bfloat16", "float16"); default: the
    model's own. `model_config_from_hf(model_config_to_hf(m)) == m`.
    """
    eos = model.eos_token_id
    dtype = dtype or model.dtype
    keys = {
        **family_keys(model),
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "dtype": dtype,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "pad_token_id": model.pad_token_id,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": _rope_parameters(model.rope),
        "rope_scaling": _rope_scaling(model.rope),
        "rope_theta": model.rope.theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    return dict(sorted(keys.items()))  # as transformers writes them


def generation_config_of(model: ModelConfig) -> dict[str, Any]:
    """A minimal `generation_config.json`: which tokens begin and end a text."""
    eos = model.eos_token_id
    config = {
        "_from_model_config": True,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": model.pad_token_id,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    return {key: value for key, value in config.items() if value is not None}


def _check_types(config: dict[str, Any], where: str) -> None:
    """Raise UserError for values of another JSON type than transformers gives them; null counts as left out.

    Python would let some through with another meaning: "false" is true, and true is 1.
    """
    token_ids = config.get("eos_token_id")
    values = [(key, config.get(key)) for key in ("bos_token_id", "pad_token_id")]
    values += [
        ("eos_token_id", i) for i in (token_ids if isinstance(token_ids, list | tuple) else [token_ids])
    ]
    layers = config.get("max_window_layers")
    expected = [
        ("an integer from 0", [("max_window_layers", layers)], lambda v: _is_integer(v) and v >= 0),
        (
            "a positive integer",
            [(key, config.get(key)) for key in _SIZES],
            lambda v: _is_integer(v) and v > 0,
        ),
        ("an integer", values, _is_integer),
        ("a number", [(key, config.get(key)) for key in _NUMBERS], _is_number),
        ("true or false", [(key, config.get(key)) for key in _FLAGS], lambda v: isinstance(v, bool)),
        ("an object", [(key, config.get(key)) for key in _OBJECTS], lambda v: isinstance(v, dict)),
    ]
    bad = [
        f"{key} = {value!r}: must be {kind}"
        for kind, entries, is_right in expected
        for key, value in entries
        if value is not None and not is_right(value)
    ]
    if bad:
        raise UserError(f"{where}: {'; '.join(bad)}.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_dtype(config: dict[str, Any], where: str) -> Any:
    named = {
        key: str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)
    }
    if len(set(named.values())) > 1:
        raise UserError(
            f"{where}: dtype is {named['dtype']} but torch_dtype is {named['torch_dtype']}. Make them equal."
        )
    dtype = next(iter(named.values()), "float32")
    if dtype not in DTYPES:
        raise UserError(f"{where}: dtype {dtype!r} is not supported. Supported: {', '.join(DTYPES)}.")
    return dtype


def _read_rope(config: dict[str, Any], where: str) -> RopeConfig:
    """RoPE from whichever spelling is there; two spellings that disagree are refused, as 4.x and 5.x would differ."""
    for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(place, dict) and place.get("partial_rotary_factor") not in (None, 1):
            raise UserError(
                f"{where}: partial_rotary_factor must be 1; rotating a part of the head is not supported."
            )
    old = _old_rope(config, where)
    new = None
    if config.get("rope_parameters"):
        new = _one_rope(
            config["rope_parameters"], config.get("rope_theta"), config, f"{where}: rope_parameters"
        )
    if old is not None and new is not None and old != new:
        raise UserError(
            f"{where}: rope_theta/rope_scaling and rope_parameters disagree ({old} against {new}). transformers 4.x "
            f"reads the former, 5.x the latter: the same file would be two models. Make them equal."
        )
    return new or old or RopeConfig()


def _old_rope(config: dict[str, Any], where: str) -> RopeConfig | None:
    if config.get("rope_theta") is None and not config.get("rope_scaling"):
        return None
    scaling = config.get("rope_scaling") or {}
    if not scaling and (config.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        # Written by 5.x with only rope_theta repeated on top: nothing is said about scaling here.
        scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    return _one_rope(scaling, config.get("rope_theta"), config, f"{where}: rope_scaling")


def _one_rope(parameters: Any, theta: float | None, config: dict[str, Any], where: str) -> RopeConfig:
    if not isinstance(parameters, dict):
        raise UserError(f"{where} must be an object, not {parameters!r}.")
    stated = {key: parameters[key] for key in _ROPE_NUMBERS if parameters.get(key) is not None}
    bad = [f"{key} = {value!r}" for key, value in stated.items() if not _is_number(value)]
    if bad:
        raise UserError(f"{where}: {', '.join(bad)}: must be a number.")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SUPPORTED_ROPE_KINDS:
        raise UserError(
            f"{where}: RoPE type {kind!r} is not supported. Supported: {', '.join(SUPPORTED_ROPE_KINDS)}."
        )
    if theta is None or parameters.get("rope_theta") is not None:
        theta = parameters.get("rope_theta") or 10000.0
    needed = {"default": (), "linear": ("factor",), "dynamic": ("factor",)}.get(
        kind, ("factor", "low_freq_factor", "high_freq_factor")
    )
    missing = [key for key in needed if parameters.get(key) is None]
    if missing:
        raise UserError(f"{where}: RoPE type {kind!r} needs {', '.join(missing)}.")
    if kind == "default":
        return RopeConfig(theta=theta)
    original = parameters.get("original_max_position_embeddings")
    if kind != "llama3":
        return RopeConfig(
            theta=theta, kind=kind, factor=parameters["factor"], original_max_position_embeddings=original
        )
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        # transformers falls back to max_position_embeddings when the original length is not stated.
        original_max_position_embeddings=original or config.get("max_position_embeddings", 2048),
    )


def _scaling_values(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"factor": rope.factor}
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.original_max_position_embeddings is not None:
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return values


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """5.x's spelling."""
    scaling = {} if rope.kind == "default" else _scaling_values(rope)
    return {"rope_theta": rope.theta, "rope_type": rope.kind, **scaling}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """4.x's spelling: `rope_type` where llama3 needs 4.43 or newer anyway, else `type`, known to every 4.x."""
    if rope.kind == "default":
        return None
    return {"rope_type" if rope.kind == "llama3" else "type": rope.kind, **_scaling_values(rope)}
