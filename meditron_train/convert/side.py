"""A model on disk, in either format, seen as Hugging Face tensors: what `verify` and `inspect` look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from meditron_train.checkpoint.export import HF_SUBDIRECTORY, read_generation_config
from meditron_train.checkpoint.foreign import ForeignOptions, ForeignSource, is_foreign_directory
from meditron_train.checkpoint.hf_config import read_hf_config
from meditron_train.checkpoint.hf_map import Piece, TensorSpec, hf_pieces, is_ignored, tensor_specs
from meditron_train.checkpoint.hf_read import HFSource, is_hf_directory
from meditron_train.checkpoint.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from meditron_train.checkpoint.megatron_read import MegatronSource, hint_at_checkpoint, is_megatron_directory
from meditron_train.checkpoint.stored import Range, Shape
from meditron_train.checkpoint.tokenizer_compare import tokenizer_fingerprint
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK_BYTES = 8 << 20


class Side(Protocol):
    """One side of a comparison. Methods raise UserError for a damaged tensor; `read` may be called by many threads.

    directory: of the model, or of the manifest alone. cast: the dtype ("bfloat16") that the side's manifest says all
    its tensors were cast to; made_from: the name of the directory that it says they come from.
    """

    directory: Path
    model: ModelConfig
    names: list[str]
    cast: str | None
    made_from: str | None

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer's fingerprint."""

    def generation(self) -> dict[str, Any] | None:
        """What generation_config.json says."""


class FullSide(Side, Protocol):
    """A side whose tensors are there. hf_files: where config.json and the tokenizer lie."""

    hf_files: Path

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor: ...


class HFSide:
    """A Hugging Face directory. Tensors are taken as they are: nothing is checked against config.json."""

    format = "hugging-face"

    def __init__(self, directory: Path) -> None:
        self.directory = self.hf_files = directory
        self.source = HFSource(directory)
        self.model = read_hf_config(directory)
        self.cast, self.made_from = _origin(directory / MANIFEST_NAME)
        self.names = [name for name in self.source.names if not is_ignored(name)]
        if self.model.tie_embeddings and _HEAD in self.names and self._head_is_the_embedding():
            self.names.remove(_HEAD)  # stored or left out, it is the same model

    def _head_is_the_embedding(self) -> bool:
        source, shape = self.source, self.source.shape(_HEAD)
        if shape != source.shape(_EMBEDDING) or source.dtype(_HEAD) != source.dtype(_EMBEDDING):
            return False
        return all(
            torch.equal(*(source.read(name, rows).view(torch.uint8) for name in (_HEAD, _EMBEDDING)))
            for rows in row_blocks(shape, source.dtype(_HEAD))
        )

    def shape(self, name: str) -> Shape:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self.source.read(name, rows)

    def tokenizer(self) -> dict[str, Any] | None:
        return tokenizer_fingerprint(self.hf_files)

    def generation(self) -> dict[str, Any] | None:
        return read_generation_config(self.hf_files)


class _JointSide:
    """Tensors of ours. The parts of a joint tensor (q, k, v; gate, up) are read out of it row by row."""

    def __init__(self, source: MegatronSource | ForeignSource, stored: set[str], hf_files: Path) -> None:
        self.hf_files = hf_files
        self._source = source
        self.model = source.model
        specs = [spec for spec in tensor_specs(self.model) if spec.name in stored]
        self._spec_of: dict[str, TensorSpec] = {name: spec for spec in specs for name in spec.hf_names}
        self.names = list(self._spec_of)

    def shape(self, name: str) -> Shape:
        spec = self._spec_of[name]
        stored = self._source.shape(spec.name)
        if stored != spec.padded_shape(self._source.padded_vocab_size):
            raise UserError(f"{spec.name} has shape {list(stored)}, which is not that of meta.json's model")
        return spec.hf_shapes[spec.hf_names.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._spec_of[name].name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        start, stop = rows or (0, self.shape(name)[0])
        parts, first = [], 0  # first: the row of the Hugging Face tensor at which the piece begins
        for piece in hf_pieces(self._spec_of[name], name):
            low, high = max(start, first), min(stop, first + piece.num_rows)
            if low < high:
                parts.append(self._read_piece(piece, low - first, high - first))
            first += piece.num_rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_piece(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        assert piece.source is not None
        return self._source.read(piece.source, rows=(piece.start + start, piece.start + stop))

    def tokenizer(self) -> dict[str, Any] | None:
        return tokenizer_fingerprint(self.hf_files)

    def generation(self) -> dict[str, Any] | None:
        return read_generation_config(self.hf_files)


class MegatronSide(_JointSide):
    """A sharded checkpoint."""

    format = "sharded"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = MegatronSource(directory, check=False)
        super().__init__(self.source, set(self.source.all_names), directory / HF_SUBDIRECTORY)
        self.cast, self.made_from = _origin(directory / MANIFEST_NAME)


class ForeignSide(_JointSide):
    """A checkpoint of Megatron-LM or Megatron-LLM."""

    format = "megatron"
    cast: str | None = None
    made_from: str | None = None

    def __init__(self, directory: Path, options: ForeignOptions) -> None:
        self.directory = directory
        self.source = ForeignSource(directory, options)
        super().__init__(self.source, set(self.source.names), self.source.tokenizer or directory)


class ManifestSide:
    """The manifest of a converted directory, without the directory: hashes stand for the tensors."""

    def __init__(self, path: Path) -> None:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["format"] != MANIFEST_FORMAT:
                raise UserError(f'{path} does not say "format": "{MANIFEST_FORMAT}".')
            if "tensors" not in manifest:
                raise UserError(
                    f"{path} holds no hashes of tensors: it is of a training checkpoint, not of a converted one. "
                    "Compare with the checkpoint itself."
                )
            self.model = ModelConfig.model_validate(manifest["model"])
            self._tensors = {
                name: (_dtype(entry["dtype"]), tuple(map(int, entry["shape"])), str(entry["sha256"]))
                for name, entry in manifest["tensors"].items()
            }
            self._tokenizer = _object(manifest, "tokenizer")
            self._generation = _object(manifest, "generation")
            fingerprint = self._tokenizer or {}
            for key in ("named_tokens", "special_settings"):
                _object(fingerprint, key)
            files = _object(fingerprint, "files") or {}
            for name in files:
                _object(files, name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise UserError(f"{path} is not the manifest of a converted directory: {error!r}") from None
        self.names = list(self._tensors)
        self.directory = path.parent
        self.cast, self.made_from = _origin(path)

    def shape(self, name: str) -> Shape:
        return self._tensors[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name][0]

    def sha256(self, name: str) -> str:
        return self._tensors[name][2]

    def tokenizer(self) -> dict[str, Any] | None:
        return self._tokenizer

    def generation(self) -> dict[str, Any] | None:
        return self._generation


def row_blocks(shape: Shape, dtype: torch.dtype) -> list[Range | None]:
    """Ranges of rows of a few MiB that cover a tensor; [None], the whole, for a scalar."""
    if not shape:
        return [None]
    height = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]


def open_side(
    path: str | Path, foreign: ForeignOptions | None = None
) -> HFSide | MegatronSide | ForeignSide | ManifestSide:
    """Open a model of any format, or a manifest: the file, or a directory that holds nothing else.

    foreign: what to add to what another program's checkpoint says. Raises UserError when it is none of these, or
    damaged beyond naming its tensors.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return ManifestSide(path)
    if path.is_dir() and [entry.name for entry in path.iterdir()] == [MANIFEST_NAME]:
        return ManifestSide(path / MANIFEST_NAME)
    return open_full_side(path, foreign)


def open_full_side(
    directory: str | Path, foreign: ForeignOptions | None = None
) -> HFSide | MegatronSide | ForeignSide:
    """Open a model of any format. Raises UserError as `open_side` does."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    if is_hf_directory(directory):
        return HFSide(directory)
    if is_foreign_directory(directory):
        return ForeignSide(directory, foreign or ForeignOptions())
    if is_megatron_directory(directory):
        return MegatronSide(directory)
    raise UserError(
        f"{directory} is not a model: neither config.json (Hugging Face) nor meta.json (sharded checkpoint)."
        + hint_at_checkpoint(directory)
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


def _object(manifest: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = manifest.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is no object")
    return value


def _origin(path: Path) -> tuple[str | None, str | None]:
    """(cast, name of the directory it was made from) as the manifest of a converted directory says."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cast, source = manifest.get("cast"), (manifest.get("source") or {}).get("directory")
    except (OSError, ValueError, AttributeError):
        return None, None  # none, or damaged, which its hashes tell
    return (cast if isinstance(cast, str) else None), (source if isinstance(source, str) else None)
