"""Reads a sharded checkpoint for megatron-core without running anything in it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from meditron_train.checkpoint.files.pickled import ForbiddenGlobal, shown
from meditron_train.checkpoint.files.stored import StoredTensor, read_stored
from meditron_train.checkpoint.files.torch_file import find_tensors, load_torch_file
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.checkpoint.sharded.torch_dist import read_record
from meditron_train.errors import UserError
from meditron_train.files import open_regular, read_json

_MAX_JSON_BYTES = 1 << 20


class CheckedReader(FileSystemReader):
    """torch's reader of sharded checkpoints, with its unpickling replaced.

    `.metadata` and every record are read as data, so nothing else opens a pickle of the checkpoint.

    Raises:
        UserError: something is missing, damaged, or could run code; names file and entry.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self._checked = read_metadata(directory)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data.get(item.storage_index)
            if place is None:
                raise UserError(
                    f"{self._directory}: {shown(item.storage_index.fqn)} has no place in any file"
                )
            if item.type == LoadItemType.BYTE_IO:
                raw = io.BytesIO()
                # What was read as data is written again: torch's reader sees no byte of the file.
                torch.save(self._record(load_torch_file, item, place), raw)
                raw.seek(0)
                planner.load_bytes(item, raw)
            else:
                target = planner.resolve_tensor(item).detach()
                part = self._read_part(item, place)
                if part.shape != target.shape:
                    raise UserError(
                        f"{self._directory}: {shown(item.storage_index.fqn)} has the shape {list(part.shape)} instead "
                        f"of {list(target.shape)}"
                    )
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _record(self, read: Callable[[int, int, int], Any], item: ReadItem, place: _StorageInfo) -> Any:
        path = self._directory / place.relative_path
        return read_record(read, path, item.storage_index.fqn, place.offset, place.length)

    def _read_part(self, item: ReadItem, place: _StorageInfo) -> torch.Tensor:
        """The box of a stored tensor that a rank wants: its rows, then the rest of the box."""
        name, path = item.storage_index.fqn, self._directory / place.relative_path
        stored = self._record(find_tensors, item, place)
        entry = self._checked.state_dict_metadata.get(name)
        dtype = entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None
        if not isinstance(stored, StoredTensor) or stored.dtype != dtype:
            raise UserError(f"{path}: the record of {shown(name)} is not a tensor of {dtype}")
        box = list(zip(item.storage_offsets, item.lengths, strict=True))
        if len(box) != len(stored.shape) or any(
            start + length > size for (start, length), size in zip(box, stored.shape, strict=True)
        ):
            raise UserError(f"{path}: the record of {shown(name)} has the shape {list(stored.shape)}")
        rows = (box[0][0], box[0][0] + box[0][1]) if box else None
        part = read_stored(path, stored, name, rows)
        for dim, (start, length) in enumerate(box[1:], 1):
            part = part.narrow(dim, start, length)
        return part


def read_common(directory: Path) -> dict[str, Any]:
    """common.pt of a checkpoint of ours: settings of the optimizer, without objects.

    Raises:
        UserError: it cannot be read.
    """
    path = directory / "common.pt"
    try:
        with open_regular(path) as file:
            found = load_torch_file(file.fileno())
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path}: the pickle refers to {error}, which a checkpoint of ours does not hold. Refused, as it could run "
            "code"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({shown(error)})") from None
    if type(found) is not dict:
        raise UserError(f"{path} holds a {type(found).__name__}, not the state of a checkpoint")
    return found


def check_format(directory: Path) -> None:
    """Check that metadata.json says what megatron-core's reader of `torch_dist` expects.

    Raises:
        UserError: it does not.
    """
    path = directory / "metadata.json"
    said = read_json(path, _MAX_JSON_BYTES)
    expected = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    known = {*expected, "common_backend_version"}
    if type(said) is not dict or not set(said) <= known or {**said, **expected} != said:
        raise UserError(f"{path} does not say that the checkpoint's format is torch_dist, version 1")
