"""What the arguments in other people's Megatron checkpoints say about the model, and how they say it of ours.

Megatron-LM and Megatron-LLM put their whole argument namespace into every checkpoint. Names differ between them and
over the years; what a name is called where stands in the tables below. Sources: Megatron-LM `training/arguments.py`
and `training/checkpointing.py`; Megatron-LLM `arguments.py` and `weights_conversion/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError

from meditron_train.checkpoint.files.pickled import spelled
from meditron_train.checkpoint.megatron.known_args import check_args
from meditron_train.config.model_config import MAX_LAYERS, Family, ModelConfig, RopeConfig
from meditron_train.errors import UserError
from meditron_train.log import get_logger

_log = get_logger(__name__)

_VOCAB_MULTIPLE = 128  # of Megatron-LM's --make-vocab-size-divisible-by, which it multiplies with the ranks
CONFIG_HINT = "Give --config DIR, a Hugging Face directory whose config.json describes the model"


@dataclass(frozen=True)
class Conventions:
    """How a program lays out weights where Megatron-LM and Megatron-LLM differ.

    Attributes:
        gate_first: in the joint first matrix of the MLP the gate comes before the up projection.
        interleaved_rotary: RoPE rotates neighboring channels (as Meta's code), not halves of the head (as
            transformers).
    """

    gate_first: bool
    interleaved_rotary: bool


def is_megatron_llm(args: Mapping[str, Any]) -> bool:
    """Whether the arguments are Megatron-LLM's, whose SwiGLU is called glu_activation."""
    return args.get("glu_activation") is not None and not args.get("swiglu")


def conventions_of(args: Mapping[str, Any], *, megatron_llm: bool) -> Conventions:
    if megatron_llm:
        return Conventions(gate_first=False, interleaved_rotary=True)
    return Conventions(gate_first=True, interleaved_rotary=bool(args.get("rotary_interleaved")))


def model_from_args(
    args: Mapping[str, Any],
    vocab_size: int | None,
    dtype: str,
    where: str,
    rope: RopeConfig | Literal["as stated"] | None = None,
) -> ModelConfig:
    """The model that the arguments describe.

    Args:
        args: as the checkpoint has them.
        vocab_size: without padding, where they do not say it.
        dtype: of the weights.
        where: file they come from, for messages.
        rope: how RoPE was scaled where they do not decide it: not at all, or by the factor that they state.

    Raises:
        UserError: the arguments do not say enough, name a feature that the model does not have, or are not
            understood (`known_args`). The message names the argument.
    """
    _check_types(args, where)
    check_args(args, where, f"{CONFIG_HINT}.", described=False)
    if not (args.get("swiglu") or args.get("glu_activation") == "swiglu"):
        raise UserError(
            f"{where}: no SwiGLU (swiglu or glu_activation = 'swiglu'): no Llama, Mistral or Qwen2.5. "
            f"Only those families are supported"
        )
    vocab_size = vocab_size or _first(args, "vocab_size")
    if vocab_size is None:
        raise UserError(
            f"{where}: the arguments do not say how many tokens the vocabulary has without padding "
            f"(padded: {args.get('padded_vocab_size')}). Give --vocab-size N or --tokenizer DIR"
        )
    num_layers = _needed(args, where, "num_layers", "encoder_num_layers")
    num_heads, hidden_size = _needed(args, where, "num_attention_heads"), _needed(args, where, "hidden_size")
    num_kv_heads = _first(args, "num_attention_heads_kv")
    if num_kv_heads is None:
        num_kv_heads = args.get("num_query_groups") if args.get("group_query_attention") else num_heads
    family, window, num_full = _family(args, num_layers, where)
    tied = args.get("tie_embed_logits")
    if tied is None:
        tied = not args.get("untie_embeddings_and_output_weights", False)
    try:
        return ModelConfig(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_needed(args, where, "ffn_hidden_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_first(args, "kv_channels") or hidden_size // num_heads,
            max_position_embeddings=_needed(args, where, "max_position_embeddings", "seq_length"),
            rms_norm_eps=_first(args, "norm_epsilon", "layernorm_epsilon", default=1e-5),
            rope=_rope(args, where, rope),
            tie_embeddings=bool(tied),
            sliding_window=window,
            num_full_attention_layers=num_full,
            initializer_range=_first(args, "init_method_std", default=0.02),
            dtype=dtype,
        )
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise UserError(f"{where}: {details}. {CONFIG_HINT}") from None


def args_of_model(model: ModelConfig, *, tp: int = 1, pp: int = 1) -> argparse.Namespace:
    """The arguments under which Megatron-LM builds the model.

    Raises:
        UserError: Megatron-LM has no argument for something that the model has.
    """
    rope = model.rope
    if rope.kind == "dynamic":
        raise UserError("Megatron-LM has no argument for RoPE scaling 'dynamic', so its files cannot say it")
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if rope.kind == "llama3" and any(getattr(rope, name) != value for name, value in fixed.items()):
        raise UserError(f"Megatron-LM knows Llama 3's RoPE scaling with {fixed} only, not {rope!r}")
    if rope.kind == "linear":
        _log.warning(
            "Megatron-LM's argument for RoPE scaled by %g (rotary_seq_len_interpolation_factor) does not reach its "
            "GPTModel: give it seq_len_interpolation_factor=%g yourself",
            rope.factor, rope.factor,
        )  # fmt: skip
    window = None if model.sliding_window is None else (model.sliding_window - 1, 0)
    layers = [int(model.has_window(layer)) for layer in range(model.num_layers)]
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        group_query_attention=model.num_kv_heads != model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=model.max_position_embeddings,
        normalization="RMSNorm",
        norm_epsilon=model.rms_norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=model.has_qkv_bias,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=rope.factor if rope.kind == "linear" else None,
        use_rope_scaling=rope.kind == "llama3",
        rope_scaling_factor=rope.factor if rope.kind == "llama3" else 8.0,
        window_size=window,
        window_attn_skip_freq=layers if model.num_full_attention_layers and window else None,
        init_method_std=model.initializer_range,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size(tp, _VOCAB_MULTIPLE * tp),
        make_vocab_size_divisible_by=_VOCAB_MULTIPLE,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=getattr(torch, model.dtype),
    )


_SIZES = (
    *(
        "num_layers",
        "encoder_num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "kv_channels",
        "num_attention_heads",
    ),
    *("num_attention_heads_kv", "num_query_groups", "max_position_embeddings", "seq_length", "vocab_size"),
    *("padded_vocab_size", "sliding_window_size"),
)
_NUMBERS = (
    *(
        "norm_epsilon",
        "layernorm_epsilon",
        "rotary_base",
        "rope_theta",
        "rope_scaling_factor",
        "init_method_std",
    ),
    "rotary_seq_len_interpolation_factor",
)


def _check_types(args: Mapping[str, Any], where: str) -> None:
    """Check that values are of the kind that these programs' own parsers give; None counts as left out.

    Raises:
        UserError: a value is of another kind.
    """
    expected: list[tuple[str, tuple[str, ...], Callable[[Any], bool]]] = [
        ("a positive integer", _SIZES, lambda v: type(v) is int and 0 < v < 1 << 31),
        (
            f"at most {MAX_LAYERS}",
            ("num_layers", "encoder_num_layers"),
            lambda v: type(v) is not int or v <= MAX_LAYERS,
        ),
        ("a finite number", _NUMBERS, lambda v: type(v) in (int, float) and abs(v) < 1e30),
        (
            "two integers",
            ("window_size",),
            lambda v: type(v) in (tuple, list) and len(v) == 2 and _integers(v),
        ),
        (
            "an integer or a list of them",
            ("window_attn_skip_freq",),
            lambda v: type(v) is int or (type(v) is list and len(v) <= 10_000 and _integers(v)),
        ),
    ]
    wrong = [
        f"{name} = {spelled(args[name])} is not {kind}"
        for kind, names, fits in expected
        for name in names
        if args.get(name) is not None and not fits(args[name])
    ]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}. {CONFIG_HINT}")


def _integers(values: Any) -> bool:
    return all(type(value) is int for value in values)


def _family(args: Mapping[str, Any], num_layers: int, where: str) -> tuple[Family, int | None, int]:
    """(family, sliding_window, num_full_attention_layers)"""
    window, num_full = args.get("sliding_window_size"), 0
    if args.get("window_size") and tuple(args["window_size"]) != (-1, -1):
        back, ahead = args["window_size"]  # Megatron-LM: keys to look back and ahead, -1 all of them
        if ahead != 0 or back < 0:
            raise UserError(f"{where}: window_size = {(back, ahead)}: only (N, 0) is supported")
        window, skip = back + 1, args.get("window_attn_skip_freq")
        if isinstance(skip, list) and skip == sorted(skip):
            num_full = skip.count(0)
        elif skip is not None:
            raise UserError(
                f"{where}: window_attn_skip_freq = {spelled(skip)}: only full attention first is supported"
            )
    if args.get("add_qkv_bias"):
        return "qwen2", window, num_full
    if num_full:
        raise UserError(f"{where}: window_attn_skip_freq without add_qkv_bias: no family has that")
    return ("mistral" if window else "llama"), window, 0


def _rope(
    args: Mapping[str, Any], where: str, otherwise: RopeConfig | Literal["as stated"] | None
) -> RopeConfig:
    theta = float(_first(args, "rotary_base", "rope_theta", default=10000.0))
    factor = _first(args, "rope_scaling_factor")
    if args.get("use_rope_scaling"):  # Megatron-LM: Llama 3's scaling, whose other constants are fixed there
        return RopeConfig(
            theta=theta, kind="llama3", factor=factor or 8.0, original_max_position_embeddings=8192
        )
    if "glu_activation" not in args:
        factor = args.get("rotary_seq_len_interpolation_factor")
        is_old = args.get("use_legacy_models") or args.get("use_mcore_models") is False
        undecided = factor not in (None, 1) and not is_old
        if undecided and isinstance(otherwise, RopeConfig) and otherwise.kind == "default":
            return RopeConfig(theta=theta)
        if undecided and otherwise is None:
            raise UserError(
                f"{where}: rotary_seq_len_interpolation_factor = {spelled(factor)}: the model before megatron-core "
                f"scaled RoPE by it, but Megatron-LM never gave it to megatron-core's GPTModel, so nothing says which "
                f"RoPE this model was trained with. {CONFIG_HINT}"
            )
    if factor in (None, 1):
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, kind="linear", factor=float(factor))


def _first(args: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((args[name] for name in names if args.get(name) is not None), default)


def _needed(args: Mapping[str, Any], where: str, *names: str) -> Any:
    value = _first(args, *names)
    if value is None:
        raise UserError(f"{where}: the arguments in the checkpoint lack {names[0]}. {CONFIG_HINT}")
    return value
