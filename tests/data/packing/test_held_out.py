from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import ids_path
from meditron_train.data.packing import held_out as module
from meditron_train.data.packing.held_out import document_hashes, held_out
from tests.data.indexed_writer import IndexedDatasetWriter


def documents(count: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 300, generator.integers(0, 150)).tolist() for _ in range(count)]


def write(
    prefix: Path, texts: list[list[int]], ids: list | None = None, dtype: str = "uint16"
) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for text in texts:
            writer.add_document(text)
    if ids is not None:
        ids_path(prefix).write_text("".join(json.dumps(value) + "\n" for value in ids))
    return IndexedDataset(prefix)


def test_depends_on_the_documents_alone(tmp_path: Path) -> None:
    texts = documents(3000)
    first = held_out(write(tmp_path / "a", texts), 0.1)
    order = np.random.default_rng(1).permutation(3000)
    other = write(tmp_path / "other-name", [[1, 2, 3], *(texts[i] for i in order)], dtype="int32")
    assert 0.08 < first.mean() < 0.12
    assert np.array_equal(held_out(other, 0.1)[1:], first[order])


def test_a_larger_fraction_contains_a_smaller_one(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", documents(2000))
    assert not (held_out(dataset, 0.05) & ~held_out(dataset, 0.2)).any()
    assert not held_out(dataset, 0.0).any()


def test_an_id_decides_where_there_is_one(tmp_path: Path) -> None:
    ids = [f"pmc{number}" if number % 2 else None for number in range(2000)]
    before, after = documents(2000, seed=1), documents(2000, seed=2)  # the same documents with revised texts
    old = held_out(write(tmp_path / "a", before, ids), 0.3)
    new = held_out(write(tmp_path / "b", after, ids), 0.3)
    assert np.array_equal(old[1::2], new[1::2])
    assert not np.array_equal(old[::2], new[::2])


def test_the_hash_is_that_of_each_document_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, and with documents of every length around twice the edge."""
    monkeypatch.setattr(module, "_BLOCK", 7)
    texts = [list(range(length)) for length in range(80)]
    together = document_hashes(write(tmp_path / "all", texts))
    assert len(set(together.tolist())) == 80
    for number in (0, 1, 31, 32, 33, 63, 64, 65, 79):
        assert document_hashes(write(tmp_path / str(number), [texts[number]]))[0] == together[number]
    changed = [*texts[79][:-1], 299]
    assert document_hashes(write(tmp_path / "changed", [changed]))[0] != together[79]
