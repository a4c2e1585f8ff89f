"""A model with its tokenizer, run by transformers, from either format on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.export import export_hf
from meditron_train.checkpoint.hf_read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.megatron_read import is_megatron_directory
from meditron_train.checkpoint.tokenizer_files import has_tokenizer
from meditron_train.errors import UserError


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
    """Load a Hugging Face directory. UserError when it is not one, is damaged, or has no tokenizer."""
    open_hf_model(directory)  # our own messages for missing shards and other architectures
    if not has_tokenizer(directory):
        raise UserError(f"{directory} has no tokenizer (tokenizer.model or tokenizer.json): copy it there.")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers draws one even for a model of a megabyte
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    return LanguageModel(model, AutoTokenizer.from_pretrained(directory))


@contextmanager
def as_hf_directory(directory: Path) -> Iterator[Path]:
    """The directory itself if it is a Hugging Face one; a sharded checkpoint exported to a temporary directory.

    UserError when it is neither.
    """
    if is_megatron_directory(directory):
        with tempfile.TemporaryDirectory(prefix="meditron-export-") as temporary:
            hf_directory = Path(temporary) / "hf"
            export_hf(directory, hf_directory)
            yield hf_directory
    elif is_hf_directory(directory):
        yield directory
    else:
        raise UserError(
            f"{directory} is not a model: it has neither config.json (Hugging Face) nor meta.json (sharded "
            "checkpoint). Of a training run, give RUN_DIR/hf or RUN_DIR/checkpoints/step_…."
        )
