"""Logits of two models on disk through two independent programs, transformers and our own, fp32 on CPU.

Both hold one layer at a time, read from disk when its turn comes, so models larger than memory are compared too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.config import model_config_to_hf
from meditron_train.checkpoint.tensor_map import hf_shapes
from meditron_train.errors import UserError
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.tokenizer.reading import encode
from meditron_train.verify.side import FullSide
from meditron_train.verify.streamed_forward import our_logits

_TEXT = (
    "A 62-year-old woman with type 2 diabetes mellitus presents with a three-week history of exertional dyspnoea and "
    "ankle oedema. Her blood pressure is 148/92 mmHg and her HbA1c is 8.1 %. The echocardiogram shows a left "
    "ventricular ejection fraction of 34 %. Guidelines recommend an ACE inhibitor, a beta-blocker, a mineralocorticoid "
    "receptor antagonist and an SGLT2 inhibitor, with renal function and potassium checked after one to two weeks."
)
_MAX_TOKENS = 256
_TOLERANCE = 1e-5  # fp32; sums in another order differ by as much, relative to the largest logit


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of A and B are apart.

    Attributes:
        max_difference: largest |Δ| of A's and B's logits, both by transformers.
        kl_divergence: mean KL divergence of B from A per token, in nats.
        ours_max_difference, ours_kl_divergence: the same for B by our program against A by transformers.
        largest: |logit|.
    """

    max_difference: float
    kl_divergence: float
    ours_max_difference: float
    ours_kl_divergence: float
    largest: float

    def problems(self) -> list[tuple[str, str]]:
        """(which comparison, what) for those that are not equal; NaN is not equal."""
        values = [
            ("A and B by transformers", self.max_difference, self.kl_divergence, _TOLERANCE),
            (
                "A by transformers, B by meditron-train",
                self.ours_max_difference,
                self.ours_kl_divergence,
                _TOLERANCE * max(1.0, self.largest),
            ),
        ]
        return [
            (what, f"max |Δ| {difference:.3e}, KL {divergence:.3e}")
            for what, difference, divergence, allowed in values
            if not difference <= allowed
        ]


def compare_logits(side_a: FullSide, side_b: FullSide, cast: torch.dtype | None = None) -> LogitComparison:
    """Run both models over one medical text (without a tokenizer, over spread-out token ids).

    Memory: one layer, the output layer and the logits in fp32.

    Args:
        side_a, side_b: the models.
        cast: the declared cast of one side's tensors, through which both go.

    Raises:
        UserError: a tensor is not that of the configuration, or cannot be read.
    """
    for side in (side_a, side_b):
        _check_shapes(side)
    ids = probe_ids(side_a)
    _require_rows(side_b, ids)
    if cast is not None:
        side_a, side_b = _Cast(side_a, cast), _Cast(side_b, cast)
    a, b = transformers_logits(side_a, ids), transformers_logits(side_b, ids)
    ours = our_logits(side_b, ids[0])[None]
    return LogitComparison(*_difference(a, b), *_difference(a, ours), a.abs().max().item())


class _Cast(FullSide):
    """A side whose tensors go through a dtype on their way."""

    def __init__(self, side: FullSide, dtype: torch.dtype) -> None:
        super().__init__(side.directory, side.hf_files, side.model, side.names)
        self.format = side.format
        self._side, self._dtype = side, dtype

    def shape(self, name: str) -> Shape:
        return self._side.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self._side.read(name, rows).to(self._dtype)


def _check_shapes(side: FullSide) -> None:
    for name, shape in hf_shapes(side.model).items():
        if name not in side.names or side.shape(name) != shape:
            raise UserError(
                f"{side.directory}: {name} is missing or has another shape than the configuration says"
            )


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    if a.shape != b.shape:
        return math.inf, math.inf
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (a - b).abs().max().item(), (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()


def transformers_logits(side: FullSide, ids_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B, S, V] of token ids [B, S] by transformers; each module's weights are there while it runs."""
    from transformers import AutoModelForCausalLM

    try:
        config = _config(side)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:  # transformers' own checks of a configuration raise nearly anything
        raise UserError(f"{side.directory}: transformers cannot build the model: {error}") from None
    # Its frequencies are not weights: they are computed on construction, which must not happen on "meta".
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    units = {f"model.layers.{number}": layer for number, layer in enumerate(model.model.layers)}
    units |= {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    for prefix, module in {**units, "lm_head": model.lm_head}.items():
        _read_when_needed(side, prefix, module)
    with torch.inference_mode():
        return model(ids_BS, use_cache=False).logits.float()


def _config(side: FullSide) -> Any:
    """As transformers reads config.json. Another program's checkpoint has none: it is what its arguments say."""
    from transformers import AutoConfig

    if side.format != "megatron" and (side.hf_files / "config.json").is_file():
        return AutoConfig.from_pretrained(side.hf_files, local_files_only=True, trust_remote_code=False)
    keys = model_config_to_hf(side.model)
    return type(AutoConfig.for_model(keys["model_type"])).from_dict(keys)


def _read_when_needed(side: FullSide, prefix: str, module: torch.nn.Module) -> None:
    names = [name for name, _ in module.named_parameters()]

    def stored_name(name: str) -> str:
        full = f"{prefix}.{name}"
        tied = full == "lm_head.weight" and full not in side.names
        return "model.embed_tokens.weight" if tied else full

    def read(*_: object) -> None:
        module.load_state_dict({name: side.read(stored_name(name)).float() for name in names}, assign=True)

    def forget(*_: object) -> None:
        module.to("meta")

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)


def probe_ids(side: FullSide) -> torch.Tensor:
    """One medical text as [1, num_tokens] int64; without a tokenizer, spread-out ids.

    Raises:
        UserError: the tokenizer cannot be read, or gives ids without a row in the embedding.
    """
    length = min(_MAX_TOKENS, side.model.max_position_embeddings)
    if has_tokenizer(side.hf_files):
        ids = torch.tensor([encode(side.hf_files, _TEXT)[:length]], dtype=torch.int64)
        _require_rows(side, ids)
        return ids
    return (torch.arange(length) * 7919 % side.model.vocab_size).unsqueeze(0)


def _require_rows(side: FullSide, ids_BS: torch.Tensor) -> None:
    """Check that the embedding of the side has a row for each of the ids, of which there are some.

    Raises:
        UserError: it has not.
    """
    if not ids_BS.numel() or int(ids_BS.max()) >= side.model.vocab_size:
        found = f"the id {int(ids_BS.max())}" if ids_BS.numel() else "no ids"
        raise UserError(
            f"{side.directory}: the tokenizer makes {found} of a text, but the model's vocabulary has "
            f"{side.model.vocab_size} tokens"
        )
