"""Hugging Face directories: config.json, weights, and the files beside them."""
