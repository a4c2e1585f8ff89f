"""Our sharded checkpoints (megatron-core's `torch_dist` with meta.json and manifest.json)."""
