"""Parts of the model that are not trained."""

from __future__ import annotations

import re

from meditron_train.config.training import FreezeSection

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def is_frozen(name: str, freeze: FreezeSection, *, tie_embeddings: bool) -> bool:
    """Whether the parameter of this name (in the whole model) stays as it is."""
    layer = _LAYER.match(name)
    if freeze.all_but_layers:
        return layer is None or int(layer[1]) not in freeze.all_but_layers
    if layer is not None:
        return int(layer[1]) < freeze.first_layers
    return freeze.embeddings and (name == _EMBEDDING or (tie_embeddings and name == _OUTPUT))
