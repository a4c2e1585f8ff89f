from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meditron_train.data.info import dataset_info
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.errors import UserError
from meditron_train.files import sha256_file
from tests.data.indexed_writer import IndexedDatasetWriter


def test_counts_hash_and_lengths(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
        for length in range(1, 101):
            writer.add_document(np.zeros(length, dtype=np.int32))
    info = dataset_info(tmp_path / "a")
    assert (info["documents"], info["tokens"], info["dtype"], info["num_bytes"]) == (
        100,
        5050,
        "int32",
        20200,
    )
    assert info["sha256"] == sha256_file(tmp_path / "a.bin")
    assert info["document_length"] == {
        "mean": 50.5, "min": 1, "max": 100, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99
    }  # fmt: skip
    assert info["meta"] is None


def test_empty(tmp_path: Path) -> None:
    IndexedDatasetWriter(tmp_path / "a", "int32").close()
    info = dataset_info(tmp_path / "a")
    assert (info["documents"], info["tokens"], info["document_length"]) == (0, 0, None)


def test_recorded_hash_is_shown_and_checked(tmp_path: Path, sentencepiece_directory: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "fever and pain"}))
    meta = tokenize([tmp_path / "in.jsonl"], tmp_path / "a", TokenizeOptions(str(sentencepiece_directory)))
    assert dataset_info(tmp_path / "a", check=True)["sha256"] == meta["sha256"]
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[3] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    assert dataset_info(tmp_path / "a")["sha256"] == meta["sha256"]
    with pytest.raises(UserError, match="was recorded when it was written"):
        dataset_info(tmp_path / "a", check=True)
