"""The model that an adapter belongs to: its weights as Hugging Face tensors, whichever format holds them, and the hash
that names them."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from meditron_train.checkpoint.files.stored import Tensors, byte_view, row_blocks
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY
from meditron_train.checkpoint.hf.read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.hf_view import HFView
from meditron_train.checkpoint.sharded.read import ShardedSource, is_sharded_directory
from meditron_train.checkpoint.tensor_map import hf_shapes
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory


@dataclass(frozen=True)
class BaseWeights:
    """A model on disk.

    Attributes:
        directory: where it lies.
        model: its shape.
        tensors: its weights under Hugging Face names, those of `hf_shapes(model)`.
        hf_files: where its tokenizer and generation settings lie.
    """

    directory: Path
    model: ModelConfig
    tensors: Tensors
    hf_files: Path


def open_base(directory: Path) -> BaseWeights:
    """Open a Hugging Face directory or a sharded checkpoint.

    Raises:
        UserError: it is neither, or damaged.
    """
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if is_hf_directory(directory):
        model, source = open_hf_model(directory)
        return BaseWeights(directory, model, source, directory)
    if is_sharded_directory(directory):
        sharded = ShardedSource(directory)
        tensors = HFView(sharded, sharded.names)
        return BaseWeights(directory, sharded.model, tensors, directory / HF_SUBDIRECTORY)
    raise UserError(
        f"{directory} is not a model: neither config.json (Hugging Face) nor meta.json (sharded checkpoint)"
    )


def weights_sha256(base: BaseWeights) -> str:
    """The hash of all names, dtypes, shapes and bytes of the weights: the same in either format and however they are
    split into files. Reads all of them.

    Raises:
        UserError: a tensor is damaged.
    """
    names = sorted(hf_shapes(base.model))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
            hashes = list(pool.map(lambda name: _tensor_sha256(base.tensors, name), names))
    finally:
        torch.set_num_threads(num_threads)
    described = [
        [name, str(base.tensors.dtype(name)), list(base.tensors.shape(name)), sha256]
        for name, sha256 in zip(names, hashes, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _tensor_sha256(tensors: Tensors, name: str) -> str:
    digest = hashlib.sha256()
    for rows in row_blocks(tensors.shape(name), tensors.dtype(name)):
        digest.update(byte_view(tensors.read(name, rows)))
    return digest.hexdigest()
