"""What is published: where the weights lie, and the training that made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.hf.read import is_hf_directory
from meditron_train.checkpoint.manifest import MANIFEST_NAME, read_manifest
from meditron_train.checkpoint.megatron.source import is_megatron_directory
from meditron_train.checkpoint.sharded.read import is_sharded_directory
from meditron_train.checkpoint.sharded.store import newest_checkpoint
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, sha256_file


@dataclass(frozen=True)
class Origin:
    """Where the weights lie, and what they come from.

    Attributes:
        weights: the directory that is published, Hugging Face or sharded.
        training: the sharded checkpoint that they come from, where it is still there; of a merged adapter, the
            adapter's.
        run_dir: of the training.
        source: what the manifest of `weights` says of where they come from.
    """

    weights: Path
    training: Path | None
    run_dir: Path | None
    source: dict[str, Any]

    @property
    def reference(self) -> Path:
        """What the published model must compute the same logits as."""
        return (
            self.weights if self.training is None or self.source.get("format") == "merged" else self.training
        )


def find_origin(checkpoint: Path) -> Origin:
    """Of a run directory (its newest intact checkpoint, or its export where there is none), a sharded checkpoint or a
    Hugging Face directory.

    Raises:
        UserError: it is none of these.
    """
    if not checkpoint.is_dir():
        raise UserError(describe_missing_directory(checkpoint))
    if (checkpoint / "checkpoints").is_dir():
        newest = newest_checkpoint(checkpoint / "checkpoints")
        if newest is not None:
            return Origin(newest, newest, checkpoint, {})
        if is_hf_directory(checkpoint / "hf"):
            return _of_hf(checkpoint / "hf")
        raise UserError(f"{checkpoint} is a run without a finished checkpoint")
    if is_hf_directory(checkpoint):
        return _of_hf(checkpoint)
    if is_megatron_directory(checkpoint):
        raise UserError(f"{checkpoint} is of Megatron-LM or Megatron-LLM: `convert megatron-to-hf` first")
    if is_sharded_directory(checkpoint):
        return Origin(checkpoint, checkpoint, _run_of(checkpoint), {})
    raise UserError(
        f"{checkpoint} is not a model: neither a run directory, nor config.json (Hugging Face), nor meta.json (sharded "
        "checkpoint)"
    )


def _of_hf(directory: Path) -> Origin:
    said = (read_manifest(directory) or {}).get("source")
    source = said if isinstance(said, dict) else {}
    if source.get("format") == "merged":
        return _of_merged(directory, source)
    training = directory.resolve().parent / "checkpoints" / str(source.get("directory"))
    if source.get("format") != "sharded" or not training.parent.is_dir():
        return Origin(directory, None, None, source)
    return _trained(directory, training, source)


def _of_merged(directory: Path, source: dict[str, Any]) -> Origin:
    """A model with an adapter merged into it: by the run that trained the adapter."""
    adapter = source.get("adapter")
    said = adapter.get("training") if isinstance(adapter, dict) else None
    if not isinstance(said, dict) or not isinstance(said.get("checkpoint"), str):
        return Origin(directory, None, None, source)
    training = Path(said["checkpoint"])
    source = {
        **source,
        "directory": training.name,
        **{key: said.get(key) for key in ("step", "manifest_sha256")},
    }
    if not training.parent.is_dir():
        return Origin(directory, None, None, source)
    return _trained(directory, training, source)


def _trained(directory: Path, training: Path, source: dict[str, Any]) -> Origin:
    """Weights of that checkpoint, with its run; without either where another training has taken its place."""
    manifest, run_dir = training / MANIFEST_NAME, training.parent.parent
    if not manifest.is_file():  # deleted for newer ones
        return Origin(directory, None, run_dir, source)
    if sha256_file(manifest) != source.get("manifest_sha256"):
        return Origin(directory, None, None, source)
    return Origin(directory, training, run_dir, source)


def _run_of(checkpoint: Path) -> Path | None:
    parent = checkpoint.resolve().parent
    return (
        parent.parent if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file() else None
    )
