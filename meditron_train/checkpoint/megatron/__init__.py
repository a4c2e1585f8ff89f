"""Checkpoints that Megatron-LM and Megatron-LLM wrote."""
