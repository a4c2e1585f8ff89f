"""Formulas: what a model costs in FLOPs, and what the hardware could do."""
