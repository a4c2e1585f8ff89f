from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from meditron_train.data.index_file import bin_path, idx_path
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.tokenizing.tokenizer import token_dtype
from meditron_train.errors import UserError
from tests.data.indexed_writer import IndexedDatasetWriter

DOCUMENTS = [([1, 2, 3, 4, 5], [2, 3]), ([], []), ([65535], [1]), ([7, 8], [0, 2])]


def write(prefix: Path, dtype: str = "uint16") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for tokens, lengths in DOCUMENTS:
            writer.add_document(tokens, lengths)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "a", dtype)
    dataset = IndexedDataset(tmp_path / "a")
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (4, 5, 8)
    assert dataset.dtype == np.dtype(dtype)
    assert dataset.document_lengths.tolist() == [5, 0, 1, 2]
    assert [dataset.document(i).tolist() for i in range(4)] == [tokens for tokens, _ in DOCUMENTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_empty_dataset_loads(tmp_path: Path) -> None:
    IndexedDatasetWriter(tmp_path / "a", "int32").close()
    dataset = IndexedDataset(tmp_path / "a")
    assert (len(dataset), dataset.num_tokens, dataset.document_lengths.tolist()) == (0, 0, [])


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with pytest.raises(ValueError, match="not fit"), IndexedDatasetWriter(prefix, "int32") as writer:
        writer.add_document([2**40])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([70000], None, "70000..70000 .* do not fit uint16"),
        ([-1], None, "do not fit"),
        ([0.5], None, "do not fit"),
        ([1, 2], [1], r"\[1\] do not add up to 2"),
        ([1], [2, -1], "do not add up"),
    ],
)
def test_writer_refuses(tmp_path: Path, tokens: list, lengths: list | None, message: str) -> None:
    writer = IndexedDatasetWriter(tmp_path / "a", "uint16")
    with pytest.raises(ValueError, match=message):
        writer.add_document(tokens, lengths)
    writer.abort()
    with pytest.raises(ValueError, match="not a token dtype"):
        IndexedDatasetWriter(tmp_path / "b", "float32")


def test_mismatching_files_name_both_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with open(bin_path(tmp_path / "a"), "ab") as file:
        file.write(b"xx")
    message = r"a\.idx \(\d+ bytes\) and .*a\.bin \(18 bytes\).* 16 bytes of tokens"
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "a")


def test_missing_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing .*a\.idx and .*a\.bin"):
        IndexedDataset(tmp_path / "a")
    write(tmp_path / "a")
    with pytest.raises(UserError, match="give the prefix, without"):
        IndexedDataset(tmp_path / "a.bin")
    content = idx_path(tmp_path / "a").read_bytes()
    for size in (0, 9, 33, 34, len(content) - 1):
        idx_path(tmp_path / "a").write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot be read"):
            IndexedDataset(tmp_path / "a")


def test_document_numbers_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "a")
    dataset = IndexedDataset(tmp_path / "a")
    for index in (-1, 4):
        with pytest.raises(IndexError):
            dataset.document(index)


def test_megatron_core_reads_and_writes_the_same_bytes(tmp_path: Path) -> None:
    import_module("meditron_train.mcore")  # first: it makes megatron.core importable without a GPU
    megatron = import_module("megatron.core.datasets.indexed_dataset")
    for dtype in (np.uint16, np.int32):
        ours, theirs = tmp_path / f"ours_{dtype.__name__}", tmp_path / f"theirs_{dtype.__name__}"
        write(ours, dtype.__name__)
        builder = megatron.IndexedDatasetBuilder(str(bin_path(theirs)), dtype=dtype)
        for tokens, lengths in DOCUMENTS:
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), lengths)
        builder.finalize(str(idx_path(theirs)))
        assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
        assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()

        loaded = megatron.IndexedDataset(str(ours))
        assert loaded.document_indices.tolist() == [0, 2, 2, 3, 5]
        assert [sequence.tolist() for sequence in loaded[0:5]] == [[1, 2], [3, 4, 5], [65535], [], [7, 8]]
        back = IndexedDataset(theirs)
        assert [back.document(i).tolist() for i in range(4)] == [tokens for tokens, _ in DOCUMENTS]
    for vocab_size in (1, 32000, 65499, 65500, 65536, 128256):
        assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_megatron_core_multimodal_modes_are_accepted(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with open(idx_path(tmp_path / "a"), "ab") as file:
        file.write(bytes(5))  # one int8 mode per sequence
    assert IndexedDataset(tmp_path / "a").num_tokens == 8
