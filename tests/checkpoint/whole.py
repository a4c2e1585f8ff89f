"""Whole tensors in memory, between Hugging Face's form and ours: what the tests compare conversions by pieces with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from meditron_train.checkpoint.tensor_map import TensorSpec


def to_megatron(
    spec: TensorSpec, tensors: Mapping[str, torch.Tensor], padded_vocab_size: int
) -> torch.Tensor:
    """The whole sharded tensor from whole Hugging Face tensors (name -> tensor), vocabulary padded with zero rows."""
    grouped = [tensors[name].reshape(spec.num_groups, -1, *spec.shape[1:]) for name in spec.hf_names]
    whole = torch.cat(grouped, dim=1).reshape(-1, *spec.shape[1:])
    missing_rows = spec.padded_shape(padded_vocab_size)[0] - whole.shape[0]
    return torch.cat([whole, whole.new_zeros(missing_rows, *whole.shape[1:])]) if missing_rows else whole


def to_hf(spec: TensorSpec, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors (contiguous) in a whole sharded tensor; vocabulary padding is removed."""
    if len(spec.hf_names) == 1:
        return {spec.hf_names[0]: tensor[: spec.shape[0]].contiguous()}
    heights = [shape[0] // spec.num_groups for shape in spec.hf_shapes]
    grouped = tensor.view(spec.num_groups, sum(heights), *tensor.shape[1:])
    parts = grouped.split(heights, dim=1)
    return {
        name: part.reshape(shape)
        for name, shape, part in zip(spec.hf_names, spec.hf_shapes, parts, strict=True)
    }
