"""The independent reference: transformers' model of the family and torch's AdamW, each document seen alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,  # odd on purpose: padded in memory, split over ranks
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,  # larger than usual, so that attention and logits are far from uniform
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Packed:
    """Same fields as the data room's PackedBatch, made by hand."""

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    loss_mask_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor


def random_batch(seed: int, *, seq_len: int = 64, micro_batch_size: int = 1, vocab_size: int = 131) -> Packed:
    """Documents of random lengths, a random share of labels masked, so that counts differ between micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = seq_len * micro_batch_size
    cuts = torch.randperm(num_tokens - 1, generator=generator)[:5] + 1
    sample_ends = torch.arange(0, num_tokens + 1, seq_len)
    bounds = torch.unique(torch.cat([cuts, sample_ends]))
    lengths = bounds.diff()
    tokens = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels = torch.roll(tokens * 7 + 3, 1) % vocab_size
    keep = 0.2 + 0.7 * torch.rand((), generator=generator)
    return Packed(
        tokens_T=tokens,
        labels_T=labels,
        loss_mask_T=(torch.rand(num_tokens, generator=generator) < keep).float(),
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=bounds.to(torch.int32),
    )


def hf_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A small model of transformers with seeded weights: a Llama, or of the family that `model_type` names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {key: value for key, value in {**TINY, **overrides}.items() if value is not None}
    settings.pop("architectures")  # save_pretrained writes the right one
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # they start at zero: random, so that a mix-up would show
            parameter.data.uniform_(-0.5, 0.5)
    return model


def loss_sum_alone(model, batch: Packed) -> torch.Tensor:
    """Sum of the counted token losses when each document goes through the model on its own."""
    total = torch.zeros((), dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        logits = model(input_ids=batch.tokens_T[None, start:end], use_cache=False).logits[0]
        losses = F.cross_entropy(logits.float(), batch.labels_T[start:end].long(), reduction="none")
        total = total + (losses * batch.loss_mask_T[start:end]).sum()
    return total


def train_reference(
    model, steps: list[list[Packed]], *, lr: float, weight_decay: float, clip: float, betas, eps
):
    """Train on the given global batches; returns per step (loss, gradient norm)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        eps=eps,
    )
    history = []
    for batches in steps:
        count = sum(float(batch.loss_mask_T.sum()) for batch in batches)
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = loss_sum_alone(model, batch) / count
            part.backward()
            loss += float(part.detach())
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        history.append((loss, grad_norm))
    return history
