"""Conversion between Hugging Face directories and sharded checkpoints, and the proof that nothing changed."""
