"""A model on disk, in either format, seen as Hugging Face tensors: what `verify` and `inspect` look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from meditron_train.checkpoint.files.stored import Range, Shape, Tensors
from meditron_train.checkpoint.hf.config import read_hf_config, refuse_adapter
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY, read_generation_config
from meditron_train.checkpoint.hf.read import HFSource, is_hf_directory
from meditron_train.checkpoint.hf_view import HFView
from meditron_train.checkpoint.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource, is_megatron_directory
from meditron_train.checkpoint.sharded.read import ShardedSource, hint_at_checkpoint, is_sharded_directory
from meditron_train.checkpoint.tensor_map import is_ignored
from meditron_train.checkpoint.tied_head import EMBEDDING, HEAD, same_values
from meditron_train.checkpoint.tokenizer.beside_model import tokenizer_fingerprint
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, read_json

_MAX_MANIFEST_BYTES = 256 << 20


class FullSide(Tensors):
    """A model whose tensors are there, under their Hugging Face names. Any thread may call `read`.

    Attributes:
        hf_files: directory with config.json and the tokenizer.
        cast: the dtype ("bfloat16") that the manifest says all tensors were cast to.
        made_from: the name of the directory that the manifest says they come from.

    Raises:
        UserError: from `shape`, `dtype` and `read`, for a damaged tensor.
    """

    format: str

    def __init__(self, directory: Path, hf_files: Path, model: ModelConfig, names: list[str]) -> None:
        self.directory, self.hf_files, self.model, self.names = directory, hf_files, model, names
        self.cast, self.made_from = _origin(directory / MANIFEST_NAME)

    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer's fingerprint."""
        return tokenizer_fingerprint(self.hf_files)

    def generation(self) -> dict[str, Any] | None:
        """What generation_config.json says."""
        return read_generation_config(self.hf_files)


class HFSide(FullSide):
    """A Hugging Face directory. Tensors are taken as they are: nothing is checked against config.json."""

    format = "hugging-face"

    def __init__(self, directory: Path) -> None:
        self.source = HFSource(directory)
        names = [name for name in self.source.names if not is_ignored(name)]
        super().__init__(directory, directory, read_hf_config(directory), names)
        tied = self.model.tie_embeddings and {HEAD, EMBEDDING} <= set(self.names)
        if tied and same_values(self.source, HEAD, EMBEDDING):
            self.names.remove(HEAD)  # stored or left out, it is the same model

    def shape(self, name: str) -> Shape:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self.source.read(name, rows)


class _JointSide(FullSide):
    """Tensors of ours, the joint ones (q, k, v; gate, up) seen as their parts."""

    def __init__(
        self, directory: Path, hf_files: Path, source: ShardedSource | MegatronSource, stored: set[str]
    ) -> None:
        self._view = HFView(source, stored)
        super().__init__(directory, hf_files, source.model, self._view.names)

    def shape(self, name: str) -> Shape:
        return self._view.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._view.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self._view.read(name, rows)


class ShardedSide(_JointSide):
    """A sharded checkpoint."""

    format = "sharded"

    def __init__(self, directory: Path) -> None:
        self.source = ShardedSource(directory, check=False)
        super().__init__(directory, directory / HF_SUBDIRECTORY, self.source, set(self.source.all_names))


class MegatronSide(_JointSide):
    """A checkpoint of Megatron-LM or Megatron-LLM. Its tokenizer is its own; the one of the options, where it has none.

    Attributes:
        has_own_tokenizer: whether it has one.
    """

    format = "megatron"

    def __init__(self, directory: Path, options: MegatronOptions) -> None:
        self.source = MegatronSource(directory, options)
        self.has_own_tokenizer = self.source.own_tokenizer is not None
        hf_files = self.source.own_tokenizer or self.source.tokenizer or directory
        super().__init__(directory, hf_files, self.source, set(self.source.names))
        self.cast = self.made_from = None


class ManifestSide:
    """The manifest of a converted directory, without the directory: hashes take the place of the tensors."""

    def __init__(self, path: Path) -> None:
        try:
            manifest = read_json(path, _MAX_MANIFEST_BYTES)
            if manifest["format"] != MANIFEST_FORMAT:
                raise UserError(f'{path} does not say "format": "{MANIFEST_FORMAT}"')
            if "tensors" not in manifest:
                raise UserError(
                    f"{path} holds no hashes of tensors: it is of a training checkpoint, not of a converted one. "
                    "Compare with the checkpoint itself"
                )
            self.model = ModelConfig.model_validate(manifest["model"])
            self._tensors = {
                name: (_dtype(entry["dtype"]), tuple(map(int, entry["shape"])), str(entry["sha256"]))
                for name, entry in manifest["tensors"].items()
            }
            self._tokenizer = _object(manifest, "tokenizer")
            self._generation = _object(manifest, "generation")
            fingerprint = self._tokenizer or {}
            for key in ("named_tokens", "settings"):
                _object(fingerprint, key)
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


AnySide = FullSide | ManifestSide


def open_side(path: str | Path, megatron: MegatronOptions | None = None) -> AnySide:
    """Open a model of any format, or a manifest: the file, or a directory that holds nothing else.

    Args:
        path: directory or file.
        megatron: what to add to what another program's checkpoint says.

    Raises:
        UserError: the path is none of these, or is damaged beyond naming its tensors.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return ManifestSide(path)
    if path.is_dir() and [entry.name for entry in path.iterdir()] == [MANIFEST_NAME]:
        return ManifestSide(path / MANIFEST_NAME)
    return open_full_side(path, megatron)


def open_full_side(
    directory: str | Path, megatron: MegatronOptions | None = None
) -> HFSide | ShardedSide | MegatronSide:
    """Open a model of any format.

    Raises:
        UserError: as `open_side`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if is_hf_directory(directory):
        return HFSide(directory)
    if is_megatron_directory(directory):
        return MegatronSide(directory, megatron or MegatronOptions())
    if is_sharded_directory(directory):
        return ShardedSide(directory)
    refuse_adapter(directory)
    raise UserError(
        f"{directory} is not a model: neither config.json (Hugging Face) nor meta.json (sharded checkpoint)."
        + hint_at_checkpoint(directory)
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype


def _object(manifest: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = manifest.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return value


def _origin(path: Path) -> tuple[str | None, str | None]:
    """(cast, name of the directory it was made from) as the manifest of a converted directory says."""
    try:
        manifest = read_json(path, _MAX_MANIFEST_BYTES)
        cast, source = manifest.get("cast"), (manifest.get("source") or {}).get("directory")
    except (UserError, AttributeError):
        return None, None  # none, or damaged, which its hashes tell
    return (cast if isinstance(cast, str) else None), (source if isinstance(source, str) else None)
