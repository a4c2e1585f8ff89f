"""Write a sharded checkpoint (megatron-core's `torch_dist`) one tensor at a time, without process groups or a model.

torch's own FileSystemWriter keeps every tensor of a file in memory until the file ends, so the files are written
here: each tensor is one `torch.save` record in a `.distcp` file, and `.metadata` says where it lies.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import meditron_train
from meditron_train.config.model_config import ModelConfig

META_FORMAT = "meditron-train/1"

# What megatron-core's dist_checkpointing.load looks for to choose its reader.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_MAX_FILE_BYTES = 4 << 30


class MegatronWriter:
    """Adds tensors to a sharded checkpoint in a directory; a context manager that completes it at the end.

    The directory must exist. On leaving the block without an error it holds `*.distcp`, `.metadata`, `common.pt`
    and `metadata.json`; `meta.json` and the manifest are the caller's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: _ErrorKeepingFile | None = None
        self._num_files = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one whole tensor (CPU, any dtype) under its global name. Raises OSError when the disk is full."""
        if name in self._tensors:
            raise ValueError(f"{name} was written before")
        file = self._current_file()
        start = file.tell()
        file.save(tensor.detach().clone() if _is_view(tensor) else tensor.detach())
        origin = torch.Size([0] * tensor.dim())
        self._tensors[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=tensor.shape,
            chunks=[ChunkStorageMetadata(offsets=origin, sizes=tensor.shape)],
        )
        place = _StorageInfo(file.path.name, start, file.tell() - start)
        self._places[MetadataIndex(name, origin, 0)] = place

    def __enter__(self) -> MegatronWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is None:
            self._finish()

    def _finish(self) -> None:
        metadata = Metadata(
            state_dict_metadata=dict(self._tensors), planner_data=None, storage_data=self._places
        )
        with (self.directory / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        with (self.directory / "common.pt").open("wb") as raw:
            torch.save({"content_metadata": {"non_homogeneous_layers": True}}, raw)
        (self.directory / "metadata.json").write_text(json.dumps(_BACKENDS))

    def _current_file(self) -> _ErrorKeepingFile:
        if self._file is not None and self._file.tell() >= _MAX_FILE_BYTES:
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = _ErrorKeepingFile(self.directory / f"__0_{self._num_files}.distcp")
            self._num_files += 1
        return self._file


def meta_json(
    model: ModelConfig,
    padded_vocab_size: int,
    *,
    step: int = 0,
    tokens: int = 0,
    samples: int = 0,
    layout: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    contains: tuple[str, ...] = ("model",),
) -> dict[str, Any]:
    """The content of `meta.json`: what the checkpoint is, readable without loading it."""
    return {
        "format": META_FORMAT,
        "step": step,
        "tokens": tokens,
        "samples": samples,
        "model": model.model_dump(mode="json"),
        "padded_vocab_size": padded_vocab_size,
        "layout": layout or {},
        "config": config,
        "versions": {"meditron_train": meditron_train.__version__, "torch": torch.__version__},
        "contains": list(contains),
    }


class _ErrorKeepingFile:
    """A file for `torch.save`, which turns a full disk into a RuntimeError: the OSError is kept and raised again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._error: OSError | None = None

    def tell(self) -> int:
        return self._file.tell()

    def save(self, tensor: torch.Tensor) -> None:
        try:
            torch.save(tensor, cast("IO[bytes]", self))
        except (RuntimeError, OSError):
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _is_view(tensor: torch.Tensor) -> bool:
    """Whether the storage holds more than the tensor: `torch.save` would write all of it."""
    return (
        not tensor.is_contiguous()
        or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    )
