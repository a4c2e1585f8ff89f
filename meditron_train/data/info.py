"""`data info`: what a dataset holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from meditron_train.data.index_file import bin_path
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import read_meta
from meditron_train.errors import UserError
from meditron_train.files import sha256_file

PERCENTILES = (5, 25, 50, 75, 95, 99)


def dataset_info(prefix: Path | str, *, check: bool = False) -> dict[str, Any]:
    """Documents, tokens, dtype, SHA-256 of the .bin, and document lengths in tokens.

    The hash is the recorded one where there is a .meta.json, else it is computed.

    Args:
        prefix: of the dataset's files.
        check: compute the hash in any case.

    Raises:
        UserError: the computed and the recorded hash differ.
    """
    dataset = IndexedDataset(prefix)
    meta = read_meta(prefix) or {}
    recorded = meta.get("sha256")
    sha256 = sha256_file(bin_path(prefix)) if check or recorded is None else recorded
    if recorded is not None and sha256 != recorded:
        raise UserError(
            f"{bin_path(prefix)} has the SHA-256 {sha256}, but {recorded} was recorded when it was "
            "written: it is "
            "damaged or was replaced. Copy it again or tokenize again"
        )
    return {
        "prefix": str(prefix),
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "num_bytes": dataset.num_bytes,
        "sha256": sha256,
        "document_length": _lengths(dataset.document_lengths),
        "meta": meta or None,
    }


def _lengths(lengths: np.ndarray) -> dict[str, float] | None:
    """Mean, extremes and percentiles; None without documents."""
    if not len(lengths):
        return None
    # The length that this share of the documents does not exceed, so a whole number.
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    percentiles = {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, values, strict=True)}
    extremes = {"min": int(lengths.min()), "max": int(lengths.max())}
    return {"mean": float(lengths.mean()), **extremes, **percentiles}
