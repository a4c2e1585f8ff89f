"""Run two models on disk through transformers, fp32 on CPU, on the same tokens."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.export import export_hf
from meditron_train.checkpoint.tokenizer_files import has_tokenizer
from meditron_train.convert.side import HFSide, Side

_TEXT = (
    "A 62-year-old woman with type 2 diabetes mellitus presents with a three-week history of exertional dyspnoea and "
    "ankle oedema. Her blood pressure is 148/92 mmHg and her HbA1c is 8.1 %. The echocardiogram shows a left "
    "ventricular ejection fraction of 34 %. Guidelines recommend an ACE inhibitor, a beta-blocker, a mineralocorticoid "
    "receptor antagonist and an SGLT2 inhibitor, with renal function and potassium checked after one to two weeks."
)
_MAX_TOKENS = 256


def compare_logits(side_a: Side, side_b: Side) -> tuple[float, float]:
    """(largest |Δ| of the logits, mean KL divergence of B from A per token in nats), over one medical text.

    Both models are held in memory one after the other, only the logits together. A sharded checkpoint is exported to
    a temporary directory first. Without a tokenizer, spread-out token ids stand in for the text.
    """
    ids = _token_ids(side_a)
    logits_a, logits_b = _logits(side_a, ids), _logits(side_b, ids)
    if logits_a.shape != logits_b.shape:
        return float("inf"), float("inf")
    log_a, log_b = logits_a.double().log_softmax(-1), logits_b.double().log_softmax(-1)
    divergence = (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()
    return (logits_a - logits_b).abs().max().item(), divergence


def _logits(side: Side, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # stderr is for what went wrong and for our own progress
    with ExitStack() as stack:
        directory = side.directory
        if not isinstance(side, HFSide):
            directory = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meditron-verify-"))) / "hf"
            )
            export_hf(side.directory, directory)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(ids).logits.float()


def _token_ids(side: Side) -> torch.Tensor:
    """[1, num_tokens] int64"""
    length = min(_MAX_TOKENS, side.model.max_position_embeddings)
    if has_tokenizer(side.hf_files):
        from transformers import AutoTokenizer

        return torch.tensor([AutoTokenizer.from_pretrained(side.hf_files).encode(_TEXT)[:length]])
    return (torch.arange(length) * 7919 % side.model.vocab_size).unsqueeze(0)
