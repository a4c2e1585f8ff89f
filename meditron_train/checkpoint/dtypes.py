"""The dtypes that weights are converted to, and their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meditron_train.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def require_convertible(name: str, dtype: torch.dtype, target: torch.dtype | None) -> None:
    """Check that a tensor stored as `dtype` can become `target` (None: stays as it is) in what we write.

    Raises:
        UserError: it cannot; the message names the tensor.
    """
    if not dtype.is_floating_point:
        raise UserError(
            f"{name} is {dtype_name(dtype)}: only floating-point weights are converted, none quantized"
        )
    if target is None and dtype not in DTYPES.values():
        raise UserError(f"{name} is {dtype_name(dtype)}: choose bf16, fp16 or fp32 with --dtype")


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """torch dtype of "bf16", "fp16" or "fp32"; None for None and "keep".

    Raises:
        UserError: the text is something else.
    """
    if dtype is None or dtype == "keep":
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown. Write one of: {', '.join(DTYPES)}, keep")
    return DTYPES[dtype]


def common_dtype(dtypes: Sequence[torch.dtype]) -> str:
    """The dtype that config.json states for these tensors: the one that most of them have."""
    return dtype_name(max(set(dtypes), key=list(dtypes).count))
