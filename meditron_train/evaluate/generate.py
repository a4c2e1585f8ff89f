"""Text from a model: greedy or sampled."""

from __future__ import annotations

import math

import torch

from meditron_train.errors import UserError
from meditron_train.evaluate.language_model import LanguageModel

MIN_TEMPERATURE = 1e-6  # logits divided by less overflow


def generate_text(
    model: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue the prompt until EOS or `max_new_tokens`, and return the continuation alone.

    Args:
        model: model and tokenizer.
        prompt: text to continue.
        max_new_tokens: upper bound.
        temperature: 0 is greedy; above, tokens are sampled at that temperature.
        top_p: tokens are sampled from the smallest set whose probability reaches it (nucleus sampling,
            Holtzman et al. 2020).
        seed: gives the same tokens on the same machine.

    Raises:
        UserError: a value is out of range, the prompt is empty and there is no BOS, or the prompt leaves no
            room.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty and the tokenizer adds no BOS: give some text")
    room = model.max_num_tokens - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens; the model reads at most {model.max_num_tokens}: shorten it"
        )
    ids_BS = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output_BS = model.model.generate(
            ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=_padding_id(model),
            **(sampling if temperature else {"do_sample": False}),
        )
    # The difference of two decodings keeps the space before the first new word, which decoding it alone would lose.
    before, whole = (
        model.tokenizer.decode(row, skip_special_tokens=True) for row in (ids, output_BS[0].tolist())
    )
    return whole[len(before) :] if whole.startswith(before) else whole


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Check the values that `generate_text` takes.

    Raises:
        UserError: one of them cannot be used.
    """
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:  # NaN compares as false
        raise UserError(
            f"temperature is {temperature}: it must be 0 (greedy) or a finite number from {MIN_TEMPERATURE:g}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}: it must be from 0 to 2^64 - 1")


def _padding_id(model: LanguageModel) -> int:
    """One row needs no padding; transformers only wants a number."""
    eos = model.model.generation_config.eos_token_id
    return (eos[0] if isinstance(eos, list) else eos) or 0
