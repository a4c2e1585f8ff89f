"""Every argument that Megatron writes into a checkpoint, in one of three classes: used, harmless, or refused by name.

An argument that may change what the model computes and that is not understood must never pass unread. Sources: the
arguments of Megatron-LM 0.16.1 and of August 2026 as their checkpoints hold them, megatron-core's TransformerConfig,
and Megatron-LLM's `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meditron_train.checkpoint.files.pickled import shown, spelled
from meditron_train.errors import UserError

USED = frozenset(
    """
    add_qkv_bias encoder_num_layers ffn_hidden_size glu_activation group_query_attention hidden_size
    init_method_std kv_channels layernorm_epsilon max_position_embeddings norm_epsilon num_attention_heads
    num_attention_heads_kv num_layers num_query_groups padded_vocab_size pipeline_model_parallel_size
    rope_scaling_factor rope_theta rotary_base rotary_interleaved rotary_seq_len_interpolation_factor
    seq_length sliding_window_size swiglu tensor_model_parallel_size tie_embed_logits
    untie_embeddings_and_output_weights use_legacy_models use_mcore_models use_rope_scaling vocab_size
    window_attn_skip_freq window_size
    """.split()
)

# What this model does not have: argument -> the values that say so. None and an argument that is absent always do.
_OFF: dict[str, tuple[Any, ...]] = {
    "activation_func": (),
    "activation_func_clamp_value": (),
    "add_bias_linear": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "decoder_num_layers": (),
    "enable_mhc_connections": (False,),
    "experimental_attention_variant": (),
    "gated_linear_unit": (True,),
    "glu_linear_offset": (0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": (),
    "heterogeneous_layers_config_path": (),
    "hybrid_attention_ratio": (0,),
    "hybrid_layer_pattern": (),
    "hybrid_mlp_ratio": (0,),
    "hybrid_override_pattern": (),
    "is_hybrid_model": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (),
    "model_name": ("llama", "llama2", "codellama", "mistral"),
    "mrope_section": (),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (0,),
    "normalization": ("RMSNorm",),
    "num_experts": (0, 1),
    "num_moe_experts": (0, 1),
    "openai_gelu": (False,),
    "parallel_attn": (False,),
    "parallel_layernorm": (False,),
    # Megatron-LLM writes an enumeration whose 1 is rotary, 2 absolute.
    "position_embedding_type": ("rope", "rotary", 1),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "quick_geglu": (False,),
    "retro_add_retriever": (False,),
    "rope_type": ("rope",),
    "rotary_percent": (1,),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "spec": ("local", ["local"]),
    "squared_relu": (False,),
    "use_bias": (False,),
    "use_mup": (False,),
    "use_post_ln": (False,),
    "use_rms_norm": (True,),
}
REFUSED = frozenset(_OFF)

# Arguments of a feature, or a family of models, whose own switch is looked at: without it nothing reads them.
_OF_SWITCHES = tuple(
    """
    biencoder_ dino_ dsa_ fim_ gdp_ mamba_ mhc_ mla_ moe_ mtp_ mup_ retriever_ retro_ vision_ yarn_
    """.split()
)
# How a run trains, saves, logs and serves.
_OF_RUNS = tuple(
    """
    adam_ async_ckpt_ ckpt_ cpu_offloading_ cuda_graph_ ddp_ dist_ckpt_ eval_ exit_ fault_injector_
    flight_recorder_ fp4_ fp8_ fsdp_ ft_ grpo_ gtp_ inference_ inprocess_ langrl_ lion_ log_ logits_ lr_
    megatron_fsdp_ muon_ non_persistent_ one_logger_ otel_ overlap_ profile_ pytorch_profiler_ recompute_ rl_
    save_ sft_ tensorboard_ tiktoken_ timing_ tokenizer_ tp_comm_ wandb_
    """.split()
)
# Names, paths, batches, precision, fusions, parallel layout, initialization, dropout; and arguments of switches that
# have names of their own.
HARMLESS = frozenset(
    """
    DDP_impl _cpu_offloading_context _is_global_batch_size_explicitly_specified
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store activation_offload_fraction
    add_position_embedding adlr_autoresume adlr_autoresume_interval align_grad_reduce align_param_gather
    allow_ambiguous_pad_tokens app_tag_run_name app_tag_run_version apply_query_key_layer_scaling
    apply_rope_fusion apply_wd_to_qk_layernorm async_save async_strategy async_tensor_model_parallel_allreduce
    attention_backend attention_dropout attention_softmax_in_fp32 auto_detect_ckpt_format autocast_dtype
    barrier_with_L1_time batch_invariant_backend batch_invariant_mode batch_p2p_comm batch_p2p_sync
    bert_binary_head bert_embedder_type bert_load bf16 bias_activation_fusion bias_dropout_fusion
    bias_gelu_fusion bias_swiglu_fusion block_data_path cache_mla_latents calc_ft_timeouts
    calculate_per_token_loss chat_template check_for_large_grads check_for_nan_in_loss_and_grad
    check_for_spiky_loss check_weight_hash_across_dp_replicas_interval checkpoint_activations classes_fraction
    clip_grad clone_scatter_output_in_embedding config_logger_dir consumed_train_samples
    consumed_valid_samples context_parallel_size cp_comm_type cpu_offloading create_all_gather_group
    create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion data_args_path
    data_cache_path data_impl data_parallel_random_init data_parallel_sharding_strategy data_parallel_size
    data_path data_per_class_fraction data_sharding data_type dataloader_defer_npy_index_mmap
    dataloader_fast_cache_load dataloader_inter_document_masking dataloader_type deallocate_pipeline_outputs
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    decoder_seq_length decoupled_lr decoupled_min_lr decrease_batch_size_if_needed
    defer_embedding_wgrad_compute delay_grad_reduce delay_offload_until_cuda_graph delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models deterministic_mode
    disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser disable_msc_deprecated
    disable_parameter_transpose_cache disable_straggler_on_startup disable_symmetric_registration
    distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations distributed_backend
    distributed_timeout_minutes distributed_timeout_seconds_after_init dump_param_to_param_group_map
    embedding_init_method embedding_init_method_std embedding_path empty_unused_memory_level enable_autocast
    enable_chunked_prefill enable_cuda_graph enable_experimental enable_ft_package
    enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger
    encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
    end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release error_injection_rate
    error_injection_type evidence_data_path exp_avg_dtype exp_avg_sq_dtype expert_gtp_weight_remat_size
    expert_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size
    external_cuda_graph fake_process_group finalize_model_grads_func fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads finetune first_last_layers_bf16 flash_attention_version
    flash_decode fp16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp8 freeze_all_layers full_validation
    fused_residual_rmsnorm fused_single_qkv_rope global_batch_size gpu_sniff_test_interval grad_reduce_in_bf16
    grad_scale_func grad_sync_func gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult
    hetereogenous_dist_checkpoint hidden_dropout hierarchical_context_parallel_sizes
    high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel hysteresis ict_head_size
    ict_load img_h img_w indexer_batch_size indexer_log_interval init_method init_method_xavier_uniform
    init_model_with_meta_device initial_loss_scale iter_per_epoch iteration iterations_to_skip
    keep_fp8_transpose_cache kitchen_attention_backend kv_lora_rank lazy_mpu_init legacy_tokenizer
    lima_dropout linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
    linear_value_head_dim load load_iters load_main_params_from_ckpt local_rank logging_level logit_dtype
    loss_scale loss_scale_window lr main_grads_dtype main_params_dtype make_vocab_size_divisible_by manual_gc
    manual_gc_eval manual_gc_interval mask_factor mask_prob mask_type masked_softmax_fusion
    max_seqlen_per_dp_cp_rank max_tokens_to_oom memory_efficient_layer_norm memory_snapshot_path merge_file
    metadata_path metrics micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus
    min_loss_scale min_lr min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training
    mmap_bin_files mmap_warmup mock_data model_type mscale mscale_all_dim multiple_validation_sets
    nccl_all_reduce_for_prefill nccl_communicator_config_path nccl_ub new_tokens no_load_optim no_load_rng
    no_new_tokens no_persist_layer_norm no_save_optim no_save_rng no_sync_func no_weight_decay_cond_type
    null_tokenizer_eod_id null_tokenizer_pad_id num_channels num_classes num_dataset_builder_threads
    num_distributed_optimizer_instances num_floating_point_operations_so_far num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_layers_per_virtual_pipeline_stage num_microbatches_with_partial_activation_checkpoints
    num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges
    object_storage_cache_path offload_modules offset_sampling_seed_by_dp_rank onnx_safe optimizer
    optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction outer_dp_sharding_strategy
    output_bert_embeddings output_layer_init_method override_ckpt_iteration override_opt_param_scheduler
    pad_vocab_size param_sync_func params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path
    perform_initialization perform_rl_step persist_layer_norm phase_transition_iterations pin_cpu_grads
    pin_cpu_params pipeline_dtype pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
    pipeline_model_parallel_split_rank pretrained_checkpoint profile q_lora_rank qk_clip qk_clip_alpha
    qk_clip_threshold qk_head_dim qk_pos_emb_head_dim quant_recipe query_in_block_prob rampup_batch_size rank
    record_memory_history record_shapes refit_method relative_attention_max_distance
    relative_attention_num_buckets replication replication_factor replication_jump rerun_mode
    reset_attention_mask reset_position_ids result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag
    rotary_scaling_factor run_workload_inspector_server sample_rate save scalar_loss_mask
    scatter_gather_tensors_in_pipeline seed sequence_parallel sft sgd_momentum sharp_enabled_group
    short_seq_prob skip_iters skip_train skipped_train_samples special_tokens split standalone_embedding_stage
    start_eval_at_iter start_weight_decay step_batch_size_schedule straggler_ctrlr_port straggler_minmax_count
    strict_fsdp_dtensor_load suggested_communication_unit_size swin_backbone_type symmetric_ar_type
    te_precision_config_file te_rng_tracker tensor_parallel_num_weight_shards test_data_path test_mode timers
    titles_data_path torch_fsdp2_reshard_after_forward tp_only_amax_red train_data_path train_iters
    train_samples train_sync_interval transformer_impl transformer_pipeline_model_parallel_size
    trust_remote_code use_checkpoint_args use_checkpoint_opt_param_scheduler
    use_contiguous_buffers_in_local_ddp use_cpu_initialization use_dist_ckpt use_dist_ckpt_deprecated
    use_distributed_optimizer use_flash_attn use_fused_weighted_squared_relu use_gigatoken
    use_gloo_process_groups use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    use_inference_optimized_layers use_kitchen use_kitchen_attention use_layer_wise_distributed_optimizer
    use_layer_wise_param_layout use_legacy_static_engine use_mamba_mem_eff_path use_megatron_fsdp
    use_mp_args_from_checkpoint_args use_multiquery_attn use_one_sent_docs use_persistent_ckpt_worker
    use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p use_rotary_position_embeddings
    use_sharp use_te_activation_func use_te_rng_tracker use_tokenizer_model_from_checkpoint_args
    use_torch_fsdp2 use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser
    v_head_dim valid_data_path validation_set_names variable_seq_lengths verify_integrity
    virtual_pipeline_model_parallel_size vocab_extra_ids vocab_extra_ids_list vocab_file weight_decay
    weight_decay_incr_style wgrad_deferral_limit world_size yaml_cfg
    """.split()
)


def check_args(args: Mapping[str, Any], where: str, hint: str, *, described: bool) -> None:
    """Check the arguments for what this model does not have.

    An unknown argument that is None, False, 0 or empty asks for nothing.

    Args:
        args: as the checkpoint has them.
        where: file they come from, for the message.
        hint: what the user can do about unknown arguments.
        described: a configuration of the user's says what the model is, so that unknown arguments need not be
            understood.

    Raises:
        UserError: names every argument that asks for what this model does not have, or that is unknown.
    """
    refused = [
        f"{name} = {spelled(_plain(args[name]))}"
        for name, fine in _OFF.items()
        if args.get(name) is not None and _plain(args[name]) not in fine
    ]
    if refused:
        raise UserError(
            f"{where}: {', '.join(refused)}: no Llama, Mistral or Qwen2.5. Only those families are supported"
        )
    unknown = [
        f"{shown(name)} = {spelled(value)}"
        for name, value in args.items()
        if not is_known(name) and value not in (None, False, "", [], (), {})
    ]
    if unknown and not described:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{where}: unknown arguments, which may change what the model computes: {', '.join(unknown[:5])}{more}. "
            f"{hint}"
        )


def is_known(name: str) -> bool:
    """Whether an argument is in one of the three classes."""
    return name in USED or name in REFUSED or name in HARMLESS or name.startswith(_OF_SWITCHES + _OF_RUNS)


def _plain(value: Any) -> Any:
    """The value of an enumeration, of which an unpickled checkpoint has a stand-in with the constructor's arguments."""
    arguments = getattr(value, "arguments", None)
    return arguments[0] if isinstance(arguments, tuple) and len(arguments) == 1 else value
