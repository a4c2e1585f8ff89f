"""Checkpoints: Hugging Face directories, sharded checkpoints, and the one table that maps their tensors."""
