"""Benchmarks: which there are, the formats that their files come in, and how a question is put to a model."""
