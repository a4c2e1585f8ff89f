"""Sources are opened by what the section says of the data; how long a sample is matters to conversations alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from meditron_train.data.sources import open_train_sources, open_validation_sources
from tests.data.indexed_writer import IndexedDatasetWriter


def test_training_and_held_out_documents_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "medical", "<u2") as writer:
        for number in range(50):
            writer.add_document(np.arange(number + 2))
    data = SimpleNamespace(
        train=[SimpleNamespace(name="medical", path=tmp_path / "medical")],
        validation=[], validation_fraction=0.2, cache_dir=None, chat=None,
    )  # fmt: skip
    train, held_out = (
        set(opened(data, None)[0].documents.tolist())
        for opened in (open_train_sources, open_validation_sources)
    )
    assert train.isdisjoint(held_out) and train | held_out == set(range(50)) and held_out
