"""A model with its tokenizer, run by transformers, from either format on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.adapters import is_adapter_directory, open_adapter
from meditron_train.checkpoint.convert.adapters import merge_adapter
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.hf.config import refuse_adapter
from meditron_train.checkpoint.hf.directory import end_token_ids, read_generation_config
from meditron_train.checkpoint.hf.read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.sharded.read import is_sharded_directory
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory
from meditron_train.tokenizer.reading import open_tokenizer


def choose_device(wanted: str) -> str:
    """cpu or cuda; for auto, what is here.

    Raises:
        UserError: it is another word, or cuda and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {wanted!r}: write auto, cpu or cuda")
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise UserError("--device is cuda, but torch finds no CUDA device. Write --device cpu")
    return wanted if wanted != "auto" else "cuda" if has_cuda else "cpu"


@dataclass(frozen=True)
class LanguageModel:
    """A transformers causal model in evaluation mode, and the tokenizer of the same directory."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_num_tokens(self) -> int:
        """The longest sequence the model was made for."""
        return self.model.config.max_position_embeddings

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] int64 to logits [B, S, V] float32, without gradients."""
        with torch.inference_mode():
            return self.model(ids_BS.to(self.device)).logits.float()


def load_language_model(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Load a Hugging Face directory.

    Raises:
        UserError: it is not one, is damaged, or has no tokenizer.
    """
    open_hf_model(directory)  # our own messages for missing shards and other architectures
    check_generation_config(directory)
    tokenizer = open_tokenizer(directory)
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers draws one even for a model of a megabyte
    local = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **local).to(device).eval()
    return LanguageModel(model, tokenizer)


def check_generation_config(directory: Path) -> None:
    """Refuse a generation_config.json at which transformers would fail while it loads the model.

    Raises:
        UserError: transformers, or we for the tokens that end a text, cannot read it.
    """
    values = read_generation_config(directory)
    end_token_ids(directory)
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(values or {})
    except Exception as error:  # whatever a library makes of wrong types
        file = directory / "generation_config.json"
        raise UserError(f"{file}: transformers cannot read it: {type(error).__name__}: {error}") from None


@contextmanager
def as_hf_directory(directory: Path) -> Iterator[Path]:
    """The directory itself if it is a Hugging Face one; a sharded checkpoint exported to a temporary directory, an
    adapter merged there into the base that it names.

    Raises:
        UserError: it is neither.
    """
    check_is_model(directory)
    if is_adapter_directory(directory):
        base = Path(open_adapter(directory).base or "")
        with tempfile.TemporaryDirectory(prefix="meditron-merge-") as temporary:
            hf_directory = Path(temporary) / "hf"
            merge_adapter(base, directory, hf_directory)
            yield hf_directory
    elif is_sharded_directory(directory):
        with tempfile.TemporaryDirectory(prefix="meditron-export-") as temporary:
            hf_directory = Path(temporary) / "hf"
            export_hf(directory, hf_directory)
            yield hf_directory
    else:
        yield directory


def check_is_model(directory: Path) -> None:
    """Find out what is missing before anything that takes long.

    Raises:
        UserError: it is neither a Hugging Face directory, nor a sharded checkpoint, nor an adapter whose base is here.
    """
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if is_adapter_directory(directory):
        base = open_adapter(directory).base
        if base is None or not Path(base).is_dir():
            raise UserError(
                f"{directory} is an adapter, and its base {base or '(not named)'} is not on this machine. Merge "
                f"it first: meditron-train convert merge-adapter BASE {directory} OUT"
            )
    elif not is_sharded_directory(directory):
        refuse_adapter(directory)
        if not is_hf_directory(directory):
            raise UserError(
                f"{directory} is not a model: it has neither config.json (Hugging Face) nor meta.json (sharded "
                "checkpoint), and it is not a run with a checkpoint"
            )
