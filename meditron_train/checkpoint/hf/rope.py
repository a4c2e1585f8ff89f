"""RoPE between `config.json` and `RopeConfig`, in the spellings of transformers 4.x and 5.x.

4.x: `rope_theta` and `rope_scaling` with `type` or `rope_type`. 5.x: all of it in `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meditron_train.config.model_config import RopeConfig
from meditron_train.errors import UserError

# Kind -> the keys that it needs.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
SUPPORTED_ROPE_KINDS = tuple(_NEEDED)
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor",
)  # fmt: skip
_KIND_KEYS = ("rope_type", "type")


def read_rope(config: Mapping[str, Any], where: str) -> RopeConfig:
    """RoPE from whichever spelling is there; two that disagree are refused, as 4.x and 5.x would differ.

    Raises:
        UserError: a kind that is not supported, a key that the kind does not have, or parameters per layer
            type. The message names `where` and the key.
    """
    for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(place, Mapping) and place.get("partial_rotary_factor") not in (None, 1):
            raise UserError(
                f"{where}: partial_rotary_factor must be 1; rotating a part of the head is not supported"
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
            f"reads the former, 5.x the latter: the same file would be two models. Make them equal"
        )
    return new or old or RopeConfig()


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, as they stand in `config.json`."""
    scaling = {} if rope.kind == "default" else _scaling_values(rope)
    # 4.x: `rope_type` where llama3 needs 4.43 or newer anyway, else `type`, known to every 4.x.
    kind_key = "rope_type" if rope.kind == "llama3" else "type"
    return {
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.kind, **scaling},
        "rope_scaling": None if rope.kind == "default" else {kind_key: rope.kind, **scaling},
        "rope_theta": rope.theta,
    }


def _old_rope(config: Mapping[str, Any], where: str) -> RopeConfig | None:
    if config.get("rope_theta") is None and not config.get("rope_scaling"):
        return None
    scaling = config.get("rope_scaling") or {}
    if not scaling and (config.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        # Written by 5.x with only rope_theta repeated on top: nothing is said about scaling here.
        scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    return _one_rope(scaling, config.get("rope_theta"), config, f"{where}: rope_scaling")


def _one_rope(parameters: Any, theta: float | None, config: Mapping[str, Any], where: str) -> RopeConfig:
    kind = _check_parameters(parameters, where)
    if theta is None or parameters.get("rope_theta") is not None:
        theta = parameters.get("rope_theta") or 10000.0
    if kind == "default":
        return RopeConfig(theta=theta)
    original = parameters.get("original_max_position_embeddings")
    if kind != "llama3":
        return RopeConfig(
            theta=theta, kind=kind, factor=parameters["factor"], original_max_position_embeddings=original
        )
    outer = config.get("original_max_position_embeddings")
    if outer is not None and original is not None and outer != original:
        raise UserError(
            f"{where}: original_max_position_embeddings is {original} here and {outer} at the top of the file. "
            f"transformers 4.x reads the former, 5.x the latter: the same file would be two models. Make them equal"
        )
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        # transformers falls back to max_position_embeddings when the original length is not stated.
        original_max_position_embeddings=original or outer or config.get("max_position_embeddings", 2048),
    )


def _check_parameters(parameters: Any, where: str) -> Any:
    """The kind of RoPE.

    Raises:
        UserError: a key is not one that the kind has.
    """
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where} must be an object, not {parameters!r}")
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"{where}: parameters per layer type ({', '.join(map(repr, nested))}) are not supported: all layers share "
            f"one RoPE here. Where the layer types have the same parameters, write them without the layer type"
        )
    stated = [parameters[key] for key in _KIND_KEYS if parameters.get(key) is not None]
    kind = stated[0] if stated else "default"
    if not isinstance(kind, str) or kind not in SUPPORTED_ROPE_KINDS:
        raise UserError(
            f"{where}: RoPE type {kind!r} is not supported. Supported: {', '.join(SUPPORTED_ROPE_KINDS)}"
        )
    if stated[1:] and stated[0] != stated[1]:
        raise UserError(f"{where}: rope_type and type disagree ({' against '.join(map(repr, stated))})")
    numbers = {key: parameters[key] for key in _NUMBERS if parameters.get(key) is not None}
    bad = [f"{key} = {value!r}" for key, value in numbers.items() if not _is_number(value)]
    if bad:
        raise UserError(f"{where}: {', '.join(bad)}: must be a number")
    missing = [key for key in _NEEDED[kind] if parameters.get(key) is None]
    if missing:
        raise UserError(f"{where}: RoPE type {kind!r} needs {', '.join(missing)}")
    fitting = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", *_NEEDED[kind]}
    foreign = {
        key: value
        for key, value in parameters.items()
        if value is not None
        and key not in fitting
        and key not in _KIND_KEYS
        and (key, value) != ("factor", 1)
    }
    if foreign:
        named = ", ".join(f"{key} = {value!r}" for key, value in foreign.items())
        raise UserError(
            f"{where}: RoPE type {kind!r} has no {named}. Name the type that it belongs to, or remove it"
        )
    return kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scaling_values(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"factor": rope.factor}
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.original_max_position_embeddings is not None:
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return values
