"""Checkpoints in the per-rank formats of Megatron-LM and Megatron-LLM, made from Hugging Face tensors.

Written from those programs' own descriptions (Megatron-LLM `weights_conversion/hf_to_sharded.py` and
`megatron/checkpointing.py`, Megatron-LM `tools/checkpoint/` and `training/checkpointing.py`), without the code under
test.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PADDING_VALUE = 7.0  # what padding rows hold must not matter


@contextmanager
def megatron_modules() -> Iterator[types.SimpleNamespace]:
    """Enums under the module names that real checkpoints pickle, as long as the block runs."""

    class PositionEmbeddingType(enum.Enum):
        rotary = 1
        absolute = 2

    class ModelType(enum.Enum):
        encoder_or_decoder = 1

    places = {"megatron.model.enums": PositionEmbeddingType, "megatron.legacy.model.enums": ModelType}
    before = {name: sys.modules.get(name) for name in places}
    for name, kind in places.items():
        kind.__module__, kind.__qualname__ = name, kind.__name__
        module = types.ModuleType(name)
        setattr(module, kind.__name__, kind)
        sys.modules[name] = module
    try:
        yield types.SimpleNamespace(PositionEmbeddingType=PositionEmbeddingType, ModelType=ModelType)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def write_legacy(
    root: Path,
    tensors: dict[str, torch.Tensor],
    args: dict[str, Any],
    *,
    style: str,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    padded_vocab_size: int,
    iteration: int | str = 1000,
    extra: dict[str, Any] | None = None,
) -> Path:
    """`root/iter_XXXXXXX/mp_rank_TT[_PPP]/model_optim_rng.pt`; returns root.

    style: "megatron-llm", "megatron-llm-release" (what its converter writes), "megatron-lm" (language_model.encoder),
    or "mcore" and "mcore-te" (megatron-core's names with local or Transformer Engine layers).
    """
    name = iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"
    chunks = [_split(_whole_model(tensors, args, style, padded_vocab_size), rank, tp) for rank in range(tp)]
    with megatron_modules() as modules:
        namespace = _namespace(args, modules, style, tp=tp, pp=pp)
        for rank in range(tp):
            for stage in range(pp):
                directory = root / name / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
                directory.mkdir(parents=True)
                content: dict[str, Any] = {
                    "args": namespace,
                    "checkpoint_version": 3.0,
                    "iteration": iteration,
                }
                for chunk in range(vpp):
                    part = _stage(chunks[rank], args["num_layers"], stage + chunk * pp, pp * vpp)
                    content["model" if vpp == 1 else f"model{chunk}"] = _nested(part, style)
                content |= {"rng_state": [_rng_state()], **(extra or {})}
                torch.save(content, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


@contextmanager
def edited(path: Path, **save_options: Any) -> Iterator[dict[str, Any]]:
    """The content of a rank's file; what the block changes in it is saved."""
    with megatron_modules():
        content = torch.load(path, weights_only=False)
        yield content
        torch.save(content, path, **save_options)


def llm_args(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Megatron-LLM's arguments for a Hugging Face config."""
    args = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_attention_heads_kv": config["num_key_value_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "parallel_attn": False,
        "make_vocab_size_divisible_by": 128,
        "glu_activation": "swiglu",
        "use_rms_norm": True,
        "use_bias": False,
        "tie_embed_logits": config["tie_word_embeddings"],
        "tokenizer_type": "SentencePieceTokenizer",
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling_factor": 1.0,
    }
    return {**args, **changes}


def lm_args(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Megatron-LM's arguments for a Hugging Face config."""
    args = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "add_bias_linear": False,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": config["rope_theta"],
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "num_experts": None,
        "window_size": None,
        "vocab_size": None,
    }
    return {**args, **changes}


def _whole_model(
    tensors: dict[str, torch.Tensor], args: dict[str, Any], style: str, padded_vocab_size: int
) -> dict[str, torch.Tensor]:
    """One tensor-parallel rank's tensors for tp = 1, under megatron-core's local names."""
    llm = style.startswith("megatron-llm")
    head_dim = args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"]
    num_groups = args["num_attention_heads_kv"] if llm else args["num_query_groups"]

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        rows = padded_vocab_size - tensor.shape[0]
        return torch.cat([tensor, tensor.new_full((rows, tensor.shape[1]), PADDING_VALUE)])

    def for_rotary(head: torch.Tensor) -> torch.Tensor:
        """A head's rows from halves to neighboring pairs, as Meta's rotary embedding wants them."""
        if not (llm or args.get("rotary_interleaved")):
            return head
        return head.unflatten(0, (2, head_dim // 2)).transpose(0, 1).flatten(0, 1)

    def join_qkv(prefix: str, kind: str) -> torch.Tensor:
        q, k, v = (tensors[f"{prefix}.self_attn.{part}_proj.{kind}"].split(head_dim) for part in "qkv")
        per_group = len(q) // num_groups
        rows = []
        for group in range(num_groups):
            rows += [for_rotary(head) for head in q[group * per_group : (group + 1) * per_group]]
            rows += [for_rotary(k[group]), v[group]]
        return torch.cat(rows)

    whole = {"embedding.word_embeddings.weight": pad(tensors["model.embed_tokens.weight"])}
    for layer in range(args["num_layers"]):
        theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        gate, up = (tensors[f"{theirs}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        whole |= {
            f"{ours}.input_layernorm.weight": tensors[f"{theirs}.input_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": join_qkv(theirs, "weight"),
            f"{ours}.self_attention.linear_proj.weight": tensors[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.pre_mlp_layernorm.weight": tensors[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat([up, gate] if llm else [gate, up]),
            f"{ours}.mlp.linear_fc2.weight": tensors[f"{theirs}.mlp.down_proj.weight"],
        }
        if f"{theirs}.self_attn.q_proj.bias" in tensors:
            whole[f"{ours}.self_attention.linear_qkv.bias"] = join_qkv(theirs, "bias")
    whole["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
    if "lm_head.weight" in tensors:
        whole["output_layer.weight"] = pad(tensors["lm_head.weight"])
    return whole


def _split(whole: dict[str, torch.Tensor], rank: int, tp: int) -> dict[str, torch.Tensor]:
    part = {}
    for name, tensor in whole.items():
        if "norm" in name:
            part[name] = tensor
        elif "linear_proj" in name or "linear_fc2" in name:
            part[name] = tensor.chunk(tp, dim=1)[rank].clone()
        elif "linear_fc1" in name:  # each half is split by itself
            part[name] = torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
        else:
            part[name] = tensor.chunk(tp)[rank].clone()
    return part


def _stage(
    part: dict[str, torch.Tensor], num_layers: int, stage: int, num_stages: int
) -> dict[str, torch.Tensor]:
    """Stage number `stage` in the order that a token passes them, its layers numbered from 0."""
    per_stage = num_layers // num_stages
    found = {}
    for name, tensor in part.items():
        head, layers, rest = name.partition("decoder.layers.")
        if layers:
            number, _, rest = rest.partition(".")
            if int(number) // per_stage == stage:
                found[f"{head}{layers}{int(number) % per_stage}.{rest}"] = tensor
        elif stage == (0 if name.startswith("embedding.") else num_stages - 1):
            found[name] = tensor
    return found


_TE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_OLD_NAMES = {
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}


def _nested(part: dict[str, torch.Tensor], style: str) -> Any:
    """The state dict as the program nests and names it."""
    if style in ("mcore", "mcore-te"):
        found: Any = OrderedDict()
        for name, tensor in part.items():
            for ours, theirs in (_TE_NAMES if style == "mcore-te" else {}).items():
                name = name.replace(ours, theirs)
            found[name] = tensor
            if style == "mcore-te" and name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                found[name.replace(".weight", "._extra_state")] = None
        return found
    language_model: dict[str, Any] = {}
    encoder: Any = OrderedDict()
    for name, tensor in part.items():
        for ours, theirs in _OLD_NAMES.items():
            name = name.replace(ours, theirs)
        if name == "embedding.word_embeddings.weight":
            flat = {"word_embeddings.weight": tensor}
            nested = {"word_embeddings": OrderedDict(weight=tensor)}
            language_model["embedding"] = flat if style == "megatron-llm-release" else nested
        elif name == "output_layer.weight":
            if style == "megatron-lm":
                language_model["output_layer"] = OrderedDict(weight=tensor)
            else:
                language_model["lm_head"] = tensor
        else:
            encoder[name.removeprefix("decoder.")] = tensor
    if style == "megatron-llm-release":
        encoder = {name.replace("self_attention", "attention"): tensor for name, tensor in encoder.items()}
    language_model["transformer" if style == "megatron-llm-release" else "encoder"] = encoder
    return {"language_model": language_model}


def _namespace(
    args: dict[str, Any], modules: types.SimpleNamespace, style: str, *, tp: int, pp: int
) -> argparse.Namespace:
    """With the objects that real namespaces hold beside numbers and words."""
    objects: dict[str, Any] = {
        "params_dtype": torch.bfloat16,
        "model_type": modules.ModelType.encoder_or_decoder,
    }
    if style == "megatron-llm":
        objects["position_embedding_type"] = modules.PositionEmbeddingType.rotary
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return argparse.Namespace(**{**args, **objects, **sizes})


def _rng_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 - as Megatron does
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
