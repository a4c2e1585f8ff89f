"""A forward pass over weights on disk, one layer in memory at a time: our attention operator, no transformers.

Legend: T tokens, H hidden, N query heads, K KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from meditron_train.checkpoint.files.stored import row_blocks
from meditron_train.model.rope import cos_sin
from meditron_train.native import Rotation, packed_attention
from meditron_train.verify.side import FullSide


def our_logits(side: FullSide, ids_T: torch.Tensor) -> torch.Tensor:
    """fp32 logits [T, V] of one document.

    Raises:
        UserError: a tensor cannot be read.
    """
    model = side.model
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in side.names else embedding
    with torch.inference_mode():
        rows = {int(i): side.read(embedding, (int(i), int(i) + 1)).float() for i in ids_T.unique()}
        x_TH = torch.cat([rows[int(i)] for i in ids_T])
        positions_T, cu_seqlens = torch.arange(len(ids_T)), torch.tensor([0, len(ids_T)], dtype=torch.int32)
        rotation = Rotation(*cos_sin(model, positions_T, cu_seqlens))
        for layer in range(model.num_layers):
            x_TH = _layer(side, layer, x_TH, rotation)
        x_TH = F.rms_norm(x_TH, x_TH.shape[1:], side.read("model.norm.weight").float(), model.rms_norm_eps)
        blocks = row_blocks(side.shape(head), torch.float32)
        return torch.cat([x_TH @ side.read(head, rows).float().T for rows in blocks], dim=-1)


def _layer(side: FullSide, layer: int, x_TH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    model, prefix, num_tokens = side.model, f"model.layers.{layer}", len(x_TH)

    def norm(name: str, x_TH: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(
            x_TH, x_TH.shape[1:], side.read(f"{prefix}.{name}.weight").float(), model.rms_norm_eps
        )

    def linear(name: str, x_TH: torch.Tensor) -> torch.Tensor:
        bias = f"{prefix}.{name}.bias"
        return F.linear(
            x_TH,
            side.read(f"{prefix}.{name}.weight").float(),
            side.read(bias).float() if bias in side.names else None,
        )

    y_TH = norm("input_layernorm", x_TH)
    q_TND, k_TKD, v_TKD = (
        linear(f"self_attn.{part}_proj", y_TH).view(num_tokens, -1, model.head_dim) for part in "qkv"
    )
    o_TND = packed_attention(
        q_TND,
        k_TKD,
        v_TKD,
        torch.tensor([0, num_tokens], dtype=torch.int32),
        window=model.sliding_window if model.has_window(layer) else None,
        rotation=rotation,
    )
    x_TH = x_TH + linear("self_attn.o_proj", o_TND.reshape(num_tokens, -1))
    y_TH = norm("post_attention_layernorm", x_TH)
    gated_TF = F.silu(linear("mlp.gate_proj", y_TH)) * linear("mlp.up_proj", y_TH)
    return x_TH + linear("mlp.down_proj", gated_TF)
