"""Measurements on one GPU. Each also runs a toy on a CPU (`--tiny --device cpu`), to show that it runs at all."""
