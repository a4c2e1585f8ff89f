"""Runs benchmarks with the lm-evaluation-harness and sets their scores beside published ones."""
