"""The output layer of a tied model: it is the embedding, whether a copy of it is stored or not.

transformers 4.x ignores a stored copy, 5.x takes it where its values differ: a copy that differs is refused, as the
same files would be two models.
"""

from __future__ import annotations

import torch

from meditron_train.checkpoint.files.stored import Tensors, row_blocks

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def same_values(source: Tensors, a: str, b: str, num_rows: int | None = None) -> bool:
    """Whether two tensors hold the same values, or their first `num_rows` rows do, read by blocks of rows: bit for bit,
    or where their dtypes differ, after a cast to float64, which is exact."""
    if source.shape(a) != source.shape(b):
        return False
    shape = source.shape(a) if num_rows is None else (num_rows, *source.shape(a)[1:])
    as_bits = source.dtype(a) == source.dtype(b)
    for rows in row_blocks(shape, max(source.dtype(a), source.dtype(b), key=lambda d: d.itemsize)):
        blocks = (source.read(a, rows), source.read(b, rows))
        if not torch.equal(*(block.view(torch.uint8) if as_bits else block.double() for block in blocks)):
            return False
    return True


def differing_head(where: str) -> str:
    """What to say of a stored output layer that is not the embedding."""
    return (
        f"{where}: the configuration ties the output layer to the embedding, but a {HEAD} with other values is stored. "
        f"Set tie_word_embeddings to false to keep it (transformers 5 uses it), or remove the tensor to keep the "
        f"embedding (transformers 4 does)"
    )
