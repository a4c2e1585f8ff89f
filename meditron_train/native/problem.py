"""What one call of packed attention is given, whichever backend computes it.

Legend: T packed query tokens, S packed key/value tokens, N query heads, K key/value heads, D head size, C = D/2,
P rows of the rotation tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (Su et al. 2021) in Llama's half-rotation layout.

    Attributes:
        cos_PC, sin_PC: fp32 [P, D/2] on the device of q. Channel pairs (i, i + D/2) turn by the angle of a row.
        q_positions_T, k_positions_S: int64 rows of the tables for each query and key; None: row t for token t.
            On a GPU they are not checked against the tables' length, as looking at them would wait for the GPU.
    """

    cos_PC: torch.Tensor
    sin_PC: torch.Tensor
    q_positions_T: torch.Tensor | None = None
    k_positions_S: torch.Tensor | None = None

    def check(self, q_TND: torch.Tensor, k_SKD: torch.Tensor) -> None:
        """Check that shapes, dtypes, devices and (on the CPU) positions fit.

        Raises:
            ValueError: one of them does not.
        """
        shape = self.cos_PC.shape
        if shape != self.sin_PC.shape or len(shape) != 2 or 2 * shape[1] != q_TND.shape[2]:
            raise ValueError(
                f"cos and sin must both be [positions, {q_TND.shape[2] / 2:g}] for heads of {q_TND.shape[2]}; got "
                f"{tuple(self.cos_PC.shape)} and {tuple(self.sin_PC.shape)}"
            )
        if self.cos_PC.dtype != torch.float32 or self.sin_PC.dtype != torch.float32:
            raise ValueError(f"cos and sin must be float32, not {self.cos_PC.dtype} and {self.sin_PC.dtype}")
        for name, tensor in vars(self).items():
            if tensor is not None and tensor.device != q_TND.device:
                raise ValueError(f"{name} is on {tensor.device}, but q is on {q_TND.device}")
        num_rows = shape[0]
        for name, positions, tokens in (
            ("q_positions", self.q_positions_T, q_TND.shape[0]),
            ("k_positions", self.k_positions_S, k_SKD.shape[0]),
        ):
            if positions is None and num_rows < tokens:
                raise ValueError(f"cos and sin have {num_rows} rows for {tokens} tokens: give {name}")
            if positions is not None and (positions.shape != (tokens,) or positions.dtype != torch.int64):
                raise ValueError(
                    f"{name} must be int64 [{tokens}], not {positions.dtype} {tuple(positions.shape)}"
                )
            # What torch.compile traces has no values yet; the operator itself checks them again.
            if positions is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
                outside = (positions < 0) | (positions >= num_rows)
                if outside.any():
                    where = int(outside.nonzero()[0])
                    raise ValueError(
                        f"{name}[{where}] is {int(positions[where])}, but cos and sin have {num_rows} rows"
                    )

    def apply(self, x_TND: torch.Tensor, positions_T: torch.Tensor | None) -> torch.Tensor:
        """x turned, in its own dtype: for backends that do not rotate themselves."""
        rows = slice(0, x_TND.shape[0]) if positions_T is None else positions_T
        cos_T1C, sin_T1C = self.cos_PC[rows, None], self.sin_PC[rows, None]
        first, second = x_TND.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C), dim=-1)
        return turned.to(x_TND.dtype)


@dataclass(frozen=True)
class Problem:
    """Checked inputs of `packed_attention`; see there. `softmax_scale` has its value, `window` may be None."""

    q_TND: torch.Tensor
    k_SKD: torch.Tensor
    v_SKD: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_kv: torch.Tensor
    softmax_scale: float
    window: int | None
    rotation: Rotation | None
    deterministic: bool

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k after the rotation, if there is one."""
        if self.rotation is None:
            return self.q_TND, self.k_SKD
        return (
            self.rotation.apply(self.q_TND, self.rotation.q_positions_T),
            self.rotation.apply(self.k_SKD, self.rotation.k_positions_S),
        )
