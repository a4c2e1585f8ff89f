"""Arguments of Megatron-LM and Megatron-LLM, with `_` for `-`, and what they are here."""

from __future__ import annotations

from typing import Any

# Argument -> our key; the value is taken as it is.
SAME: dict[str, str] = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "make_vocab_size_divisible_by": "parallel.vocab_multiple",
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "train_iters": "train.steps",
    "seq_length": "train.seq_len",
    "seed": "train.seed",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "adam_eps": "optimizer.eps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "load": "model.from",
    "save": "logging.run_dir",
    "save_interval": "checkpoint.interval",
    "eval_interval": "validation.interval",
    "eval_iters": "validation.steps",
    "log_interval": "logging.interval",
    "wandb_project": "logging.wandb_project",
    "wandb_exp_name": "logging.wandb_name",
}
# What Megatron-LM and Megatron-LLM take where an argument is left out, and our defaults are others.
LEFT_OUT: dict[str, Any] = {
    "optimizer.min_lr": 0.0,
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "schedule.kind": "linear",
}
# The same of a model with fresh weights, and the arguments that say otherwise.
LEFT_OUT_OF_SHAPE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rms_norm_eps": (1e-5, ("norm_epsilon", "layernorm_epsilon")),
    "tie_word_embeddings": (True, ("untie_embeddings_and_output_weights", "no_tie_embed_logits")),
}
# Values of SAME that are words, also where they look like a number.
WORDS = ("load", "save", "wandb_project", "wandb_exp_name")
# Any of these turns Weights & Biases on, which is off here unless asked for.
WANDB = ("wandb_logger", "wandb_project", "wandb_exp_name")
# Switch -> our key, which it sets to true.
SWITCHES: dict[str, str] = {
    "sequence_parallel": "parallel.sequence",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_grad_reduce": "parallel.overlap_grad_reduce",
    "overlap_param_gather": "parallel.overlap_param_gather",
    "async_save": "checkpoint.async_save",
}
# Argument -> the name of the shape under Hugging Face's names, for a model that starts from random weights.
SHAPE: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "num_attention_heads_kv": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}
# What is always so here, or decided by itself.
ALREADY: dict[str, str] = {
    "swiglu": "the model's family says it",
    "use_rms_norm": "the model's family says it",
    "disable_bias_linear": "the model's family says it",
    "untie_embeddings_and_output_weights": "the model's configuration says it",
    "no_tie_embed_logits": "the model's configuration says it",
    "group_query_attention": "num_query_groups says it",
    "reset_position_ids": "always: positions start again in every document",
    "reset_attention_mask": "always: attention stays inside each document",
    "eod_mask_loss": "always: the last token of a document has no label",
    "use_flash_attn": "train.attention: auto takes the best that is installed",
    "transformer_impl": "train.attention: auto takes the best that is installed",
    "use_mcore_models": "always",
    "attention_softmax_in_fp32": "always",
    "accumulate_allreduce_grads_in_fp32": "always",
    "exit_signal_handler": "always: SIGTERM and SIGUSR1 save and stop",
    "finetune": "model.from takes the weights alone; a run continues from its own checkpoints",
    "no_load_optim": "model.from takes the weights alone",
    "no_load_rng": "model.from takes the weights alone",
    "use_checkpoint_args": "always: a checkpoint carries its configuration",
    "dataloader_type": "the order of samples follows from data.seed and the step",
    "ckpt_format": "one format, which every layout loads",
    "use_dist_ckpt": "one format, which every layout loads",
    "distributed_backend": "NCCL on GPUs, gloo on CPUs",
    "use_rotary_position_embeddings": "the model's family says it",
    "position_embedding_type": "the model's family says it",
    "hidden_dropout": "no dropout, as in Llama",
    "attention_dropout": "no dropout, as in Llama",
    "num_workers": "samples are gathered by threads; data.prefetch steps ahead",
    "tensorboard_dir": "RUN_DIR/tensorboard, with logging.tensorboard",
    "profile": "train.profile.from_step and num_steps",
    "distributed_timeout_minutes": "resilience.hang_other_s",
}
