"""Every key of a `config.json`, in one of three classes: used, harmless, or refused by name.

A key that may change what the model computes and that is not understood must never pass unread. Sources: transformers'
PretrainedConfig, LlamaConfig, MistralConfig and Qwen2Config, versions 4.57 and 5.23, and configurations on the Hub.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

USED = frozenset(
    """
    architectures attention_bias bos_token_id dtype eos_token_id head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor
    rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype
    use_sliding_window vocab_size
    """.split()
)

# What the next token's probability does not depend on: names, versions, what is returned, how it is computed, dropout
# in training, labels of classifiers, other programs' notes, and the settings of generation that 4.x kept here.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path _output_attentions attention_dropout
    attention_probs_dropout_prob attn_implementation auto_map chunk_size_feed_forward cls_token_id
    cross_attention_hidden_size ddp_timeout decoder_start_token_id embd_pdrop experts_implementation finetuning_task
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label is_decoder is_llama_config label2id language
    license logits_to_keep mask_token_id max_seq_len max_seq_length max_sequence_length model_max_length model_name
    name name_or_path neftune_noise_alpha num_labels num_logits_to_keep output_attentions output_hidden_states
    output_router_logits output_scores prefix pretraining_tp problem_type resid_pdrop return_dict sep_token_id
    seq_len seq_length task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_flash_attention use_flash_attn use_return_dict

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)

# What this model does not have: key -> the values that say so. null and a key left out always do.
_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "quantization_config": ({},),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}

_WHY = {
    "attention_bias": "only Qwen2's query, key and value may have a bias here; only attention_bias: false is supported",
    "mlp_bias": "only Qwen2's query, key and value may have a bias here; only mlp_bias: false is supported",
    "quantization_config": "the weights are quantized; use the unquantized model",
    "partial_rotary_factor": "it must be 1, as rotating a part of the head is not supported",
}


_IF_IGNORED = "if transformers ignores it in a model of this type, remove it from the file"


def key_problems(config: Mapping[str, Any]) -> list[str]:
    """Every key that asks for what this model does not have, or that is unknown, with the nearest known key.

    An unknown key that is null, false or empty asks for nothing.
    """
    problems = []
    for key, value in config.items():
        if value is None or (key in _OFF and value in _OFF[key]):
            continue
        if key in _OFF:
            problems.append(f"{key} is {_shown(value)}: {_WHY.get(key, 'this is not supported')}")
        elif key not in USED and key not in HARMLESS and value not in (False, "", [], {}):
            near = difflib.get_close_matches(key, USED, n=1, cutoff=0.8)
            advice = f"did you mean {near[0]}?" if near else _IF_IGNORED
            problems.append(
                f"{key} = {_shown(value)} is unknown and may change what the model computes; {advice}"
            )
    return problems


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= limit else f"{text[:limit]}…"
