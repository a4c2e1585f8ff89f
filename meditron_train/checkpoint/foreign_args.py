"""What the arguments in other people's Megatron checkpoints say about the model.

Megatron-LM and Megatron-LLM put their whole argument namespace into every checkpoint. Names differ between them and
over the years; what a name is called where stands in the tables below. Sources: Megatron-LM `training/arguments.py`
and `training/checkpointing.py`; Megatron-LLM `arguments.py` and `weights_conversion/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from meditron_train.config.model_config import Family, ModelConfig, RopeConfig
from meditron_train.errors import UserError

CONFIG_HINT = "Give --config DIR, a Hugging Face directory whose config.json describes the model"


@dataclass(frozen=True)
class Conventions:
    """How a program lays out weights where Megatron-LM and Megatron-LLM differ.

    gate_first: in the joint first matrix of the MLP the gate comes before the up projection.
    interleaved_rotary: RoPE rotates neighbouring channels (as Meta's code), not halves of the head (as transformers).
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


# Features whose weights or meaning differ from this model's: argument -> values that are fine.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "normalization": (None, "RMSNorm"),
    "use_rms_norm": (None, True),
    "add_bias_linear": (None, False),
    "use_bias": (None, False),
    "glu_activation": (None, "swiglu"),
    "num_experts": (None, 0, 1),
    "multi_latent_attention": (None, False),
    "qk_layernorm": (None, False),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "parallel_attn": (None, False),
    "parallel_layernorm": (None, False),
    "rotary_percent": (None, 1, 1.0),
    "hybrid_override_pattern": (None,),
}


def model_from_args(args: Mapping[str, Any], vocab_size: int | None, dtype: str, where: str) -> ModelConfig:
    """The model that the arguments describe. UserError, naming the argument, where they do not say enough or name a
    feature that the model does not have."""
    _check_supported(args, where)
    vocab_size = vocab_size or _first(args, "vocab_size")
    if vocab_size is None:
        raise UserError(
            f"{where}: the arguments do not say how many tokens the vocabulary has without padding "
            f"(padded: {args.get('padded_vocab_size')}). Give --vocab-size N or --tokenizer DIR."
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
            rope=_rope(args),
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
        raise UserError(f"{where}: {details}. {CONFIG_HINT}.") from None


def _check_supported(args: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"{name} = {args[name]!r}"
        for name, fine in _MUST_BE.items()
        if name in args and args[name] not in fine
    ]
    if not (args.get("swiglu") or args.get("glu_activation")):
        wrong.append("no SwiGLU (swiglu or glu_activation)")
    if wrong:
        raise UserError(
            f"{where}: {', '.join(wrong)}: no Llama, Mistral or Qwen2.5. Only those families are supported."
        )


def _family(args: Mapping[str, Any], num_layers: int, where: str) -> tuple[Family, int | None, int]:
    """(family, sliding_window, num_full_attention_layers)"""
    window, num_full = args.get("sliding_window_size"), 0
    if args.get("window_size"):  # Megatron-LM: keys to look back and ahead
        back, ahead = args["window_size"]
        if ahead != 0 or back < 0:
            raise UserError(f"{where}: window_size = {(back, ahead)}: only (N, 0) is supported.")
        window, skip = back + 1, args.get("window_attn_skip_freq")
        if isinstance(skip, list) and skip == sorted(skip):
            num_full = skip.count(0)
        elif skip is not None:
            raise UserError(
                f"{where}: window_attn_skip_freq = {skip!r}: only full attention first is supported."
            )
    if args.get("add_qkv_bias"):
        return "qwen2", window, num_full
    if num_full:
        raise UserError(f"{where}: window_attn_skip_freq without add_qkv_bias: no family has that.")
    return ("mistral" if window else "llama"), window, 0


def _rope(args: Mapping[str, Any]) -> RopeConfig:
    theta = float(_first(args, "rotary_base", "rope_theta", default=10000.0))
    factor = _first(args, "rope_scaling_factor")
    if args.get("use_rope_scaling"):  # Megatron-LM: Llama 3's scaling, whose other constants are fixed there
        return RopeConfig(
            theta=theta, kind="llama3", factor=factor or 8.0, original_max_position_embeddings=8192
        )
    if "glu_activation" not in args:
        factor = args.get("rotary_seq_len_interpolation_factor")
    if factor in (None, 1, 1.0):
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, kind="linear", factor=float(factor))


def _first(args: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((args[name] for name in names if args.get(name) is not None), default)


def _needed(args: Mapping[str, Any], where: str, *names: str) -> Any:
    value = _first(args, *names)
    if value is None:
        raise UserError(f"{where}: the arguments in the checkpoint lack {names[0]}. {CONFIG_HINT}.")
    return value
