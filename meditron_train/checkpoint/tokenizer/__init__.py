"""Tokenizer files beside a model."""
