from __future__ import annotations

import json
import os
from dataclasses import astuple
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from meditron_train.config.data import DataSection
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.meta import FORMAT, meta_path
from meditron_train.data.packed import (
    PackedDataset,
    Segment,
    build_train_dataset,
    build_validation_datasets,
)
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.data.sources import vocabulary
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import MeditronError, UserError
from meditron_train.native import packing as native
from tests.data.indexed_writer import IndexedDatasetWriter

SEQ_LEN = 32


def write(prefix: Path, lengths: list[int], seed: int = 0, vocab_size: int = 300) -> Path:
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in lengths:
            writer.add_document(generator.integers(0, vocab_size, length))
    return prefix


def section(train: list, **changes: object) -> DataSection:
    entries = [{"name": f"source{i}"} | entry for i, entry in enumerate(train)]
    return DataSection.model_validate({"tokenizer": "none", "seed": 1, "train": entries} | changes)


@pytest.fixture
def two_sources(tmp_path: Path) -> list[dict]:
    generator = np.random.default_rng(5)
    return [
        {"path": write(tmp_path / name, generator.integers(0, 80, 150).tolist(), seed)}
        for seed, name in enumerate("ab")
    ]


def reference(dataset: PackedDataset, numbers: list[int]) -> dict[str, list]:
    """A micro-batch token by token."""
    out: dict[str, list] = {"tokens": [], "labels": [], "mask": [], "positions": [], "cu_seqlens": [0]}
    for number in numbers:
        filled = 0
        for segment in dataset.segments(number):
            document = dataset.sources[segment.source].dataset.document(segment.document).tolist()
            for i in range(segment.length):
                place = segment.start + i
                has_next = place + 1 < len(document)
                out["tokens"].append(document[place])
                out["labels"].append(document[place + 1] if has_next else 0)
                out["mask"].append(float(has_next))
                out["positions"].append(i)
            filled += segment.length
            out["cu_seqlens"].append(out["cu_seqlens"][-1] + segment.length)
        padding = dataset.seq_len - filled
        assert padding >= 0
        for name in ("tokens", "labels", "mask"):
            out[name] += [0] * padding
        out["positions"] += range(padding)
        if padding:
            out["cu_seqlens"].append(out["cu_seqlens"][-1] + padding)
    return out


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_microbatch_is_the_reference(two_sources: list[dict], packing: str) -> None:
    dataset = build_train_dataset(section(two_sources, packing=packing), SEQ_LEN, None)
    last = 2 * dataset.samples_per_epoch
    for numbers in ([0], [3, 1, 2], list(range(last - 4, last)), list(range(50))):
        batch, expected = dataset.microbatch(numbers), reference(dataset, numbers)
        assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.positions_T.dtype == torch.int32
        assert batch.loss_mask_T.dtype == torch.bool
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.tokens_T.shape == (len(numbers) * SEQ_LEN,)
        assert batch.tokens_T.tolist() == expected["tokens"]
        assert batch.labels_T.tolist() == expected["labels"]
        assert batch.loss_mask_T.tolist() == expected["mask"]
        assert batch.positions_T.tolist() == expected["positions"]
        assert batch.cu_seqlens.tolist() == expected["cu_seqlens"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_of_one_source_holds_each_token_once(tmp_path: Path, packing: str) -> None:
    lengths = [5, 0, 70, 32, 33, 1, 12, 31]
    data = section([{"path": write(tmp_path / "a", lengths)}], packing=packing)
    dataset = build_train_dataset(data, SEQ_LEN, None)
    for epoch in (0, 1):
        first = epoch * dataset.samples_per_epoch
        segments = [s for n in range(dataset.samples_per_epoch) for s in dataset.segments(first + n)]
        tokens = sorted((s.document, s.start + i) for s in segments for i in range(s.length))
        assert tokens == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    assert dataset.num_tokens == sum(lengths)


def test_sources_keep_their_weight_at_every_prefix(two_sources: list[dict]) -> None:
    two_sources[0]["weight"], two_sources[1]["weight"] = 0.7, 0.3
    dataset = build_train_dataset(section(two_sources), SEQ_LEN, None)
    second = 0
    for number in range(1000):
        second += dataset.segments(number)[0].source == 1
        assert abs(second - 0.3 * (number + 1)) < 1 + 1e-9


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_token_budgets_are_shares_of_tokens(two_sources: list[dict], packing: str) -> None:
    two_sources[0] |= {"token_budget": 300_000, "weight": None}
    two_sources[1] |= {"token_budget": 100_000, "weight": None}
    dataset = build_train_dataset(section(two_sources, packing=packing), SEQ_LEN, None)
    tokens = [0, 0]
    for number in range(12 * dataset.samples_per_epoch):
        for segment in dataset.segments(number):
            tokens[segment.source] += segment.length
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


def test_token_budgets_pack_each_source_once(
    two_sources: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blend needs the number of samples that a source fills, and packing a large corpus takes minutes."""
    pack = Mock(wraps=native.pack_best_fit)
    monkeypatch.setattr(native, "pack_best_fit", pack)
    for entry in two_sources:
        entry |= {"token_budget": 1000, "weight": None}
    build_train_dataset(section(two_sources, packing="best_fit"), SEQ_LEN, None)
    assert pack.call_count == len(two_sources)


def test_order_depends_on_seed_and_name_not_on_path(two_sources: list[dict], tmp_path: Path) -> None:
    first = build_train_dataset(section(two_sources), SEQ_LEN, None)
    moved = [{"path": tmp_path / "moved" / entry["path"].name} for entry in two_sources]
    (tmp_path / "moved").mkdir()
    for entry in two_sources:
        for suffix in ("idx", "bin"):
            name = f"{entry['path'].name}.{suffix}"
            (tmp_path / name).rename(tmp_path / "moved" / name)
    second = build_train_dataset(section(moved), SEQ_LEN, None)
    assert first.fingerprint == second.fingerprint
    assert [first.segments(n) for n in range(40)] == [second.segments(n) for n in range(40)]
    other = build_train_dataset(section(moved, seed=2), SEQ_LEN, None)
    assert [first.segments(n) for n in range(40)] != [other.segments(n) for n in range(40)]


def test_fingerprint_covers_what_the_order_depends_on(two_sources: list[dict], tmp_path: Path) -> None:
    def fingerprint(train: list[dict] = two_sources, seq_len: int = SEQ_LEN, **changes: object) -> str:
        return build_train_dataset(section(train, **changes), seq_len, None).fingerprint

    found = {
        "base": fingerprint(),
        "seed": fingerprint(seed=2),
        "packing": fingerprint(packing="concat"),
        "seq_len": fingerprint(seq_len=16),
        "weights": fingerprint([two_sources[0] | {"weight": 2.0}, two_sources[1]]),
        "name": fingerprint([two_sources[0] | {"name": "x"}, two_sources[1]]),
        "held out": fingerprint(validation_fraction=0.1),
        "data": fingerprint([{"path": write(tmp_path / "c", [40] * 50)}, two_sources[1]]),
    }
    assert len(set(found.values())) == len(found)
    assert fingerprint() == found["base"]


def test_held_out_documents_are_never_trained_on(two_sources: list[dict], tmp_path: Path) -> None:
    extra = {"name": "extra", "path": write(tmp_path / "extra", [3, 4])}
    data = section(two_sources, validation_fraction=0.2, validation=[extra])
    train, validation = (
        build_train_dataset(data, SEQ_LEN, None),
        build_validation_datasets(data, SEQ_LEN, None),
    )
    assert list(validation) == ["extra", "source0", "source1"]
    assert validation["extra"].num_tokens == 7  # less than a sample: padded
    for source, name in enumerate(("source0", "source1")):
        trained = set(train.sources[source].documents.tolist())
        held = set(validation[name].sources[0].documents.tolist())
        assert trained | held == set(range(150))
        assert not trained & held
        assert 15 < len(held) < 50
        samples = range(validation[name].samples_per_epoch)
        assert {s.document for n in samples for s in validation[name].segments(n)} <= held
    seen = {(s.source, s.document) for n in range(2 * train.samples_per_epoch) for s in train.segments(n)}
    assert all(document in train.sources[source].documents for source, document in seen)


def test_phases_change_the_mixture_and_only_those_that_began_count(two_sources: list[dict]) -> None:
    schedule = BatchSchedule(4)
    phases = [{"from_step": 6, "weights": {"source1": 1}}, {"from_step": 11, "weights": {"source0": 1}}]
    plain = build_train_dataset(section(two_sources), SEQ_LEN, None)
    dataset = build_train_dataset(section(two_sources, phases=phases), SEQ_LEN, None, schedule)
    sources = [dataset.segments(number)[0].source for number in range(60)]
    assert sources[20:40] == [1] * 20 and sources[40:] == [0] * 20
    assert [dataset.segments(n) for n in range(20)] == [plain.segments(n) for n in range(20)]
    assert dataset.fingerprint_until(20) == plain.fingerprint_until(20) == plain.fingerprint
    one = build_train_dataset(section(two_sources, phases=phases[:1]), SEQ_LEN, None, schedule)
    assert dataset.fingerprint_until(40) == one.fingerprint != plain.fingerprint
    assert dataset.fingerprint_until(41) == dataset.fingerprint != one.fingerprint


def test_a_phase_from_the_first_step_stands_for_the_weights(two_sources: list[dict]) -> None:
    phases = [{"from_step": 1, "weights": {"source1": 1}}]
    dataset = build_train_dataset(section(two_sources, phases=phases), SEQ_LEN, None, BatchSchedule(4))
    assert {dataset.segments(number)[0].source for number in range(30)} == {1}


@pytest.mark.parametrize("spelling", ["absolute", "dots", "directory link", "file links"])
def test_the_same_data_by_another_spelling_is_one_source(
    tmp_path: Path, two_sources: list[dict], spelling: str, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path)
    for suffix in (".bin", ".idx"):
        Path(f"c{suffix}").symlink_to(f"a{suffix}")
    path = {
        "absolute": tmp_path / "a",
        "dots": "linked/../a",
        "directory link": "linked/a",
        "file links": "c",
    }
    named = {
        "name": "v",
        "path": path[spelling] if spelling != "dots" else f"{tmp_path}/../{tmp_path.name}/a",
    }
    build_validation_datasets(section([{"path": "a"}], validation=[named]), SEQ_LEN, None)
    assert "validation source v is also trained on" in caplog.text
    build_train_dataset(section([{"path": "a"}, {"path": named["path"]}]), SEQ_LEN, None)
    assert "training sources source0 and source1 are the same data" in caplog.text


def test_a_file_that_is_truncated_while_it_is_read_is_named(two_sources: list[dict], caplog) -> None:
    dataset = build_train_dataset(section(two_sources), SEQ_LEN, None)
    dataset.microbatch(list(range(8)))
    path = Path(f"{two_sources[0]['path']}.bin")
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    dataset.microbatch(list(range(8)))
    assert caplog.text.count("was written to while it is read") == 1
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(
        MeditronError, match=rf"a\.bin was truncated .* had {len(content)} bytes and has 100 now"
    ):
        dataset.microbatch(list(range(8)))


def test_segments_are_plain_values(two_sources: list[dict]) -> None:
    segment = build_train_dataset(section(two_sources), SEQ_LEN, None).segments(0)[0]
    assert isinstance(segment, Segment)
    assert all(type(value) is int for value in astuple(segment))


class TestBadInput:
    def test_empty_dataset(self, tmp_path: Path) -> None:
        for lengths in ([], [0, 0]):
            with pytest.raises(UserError, match=r"'source0' .* is empty"):
                build_train_dataset(section([{"path": write(tmp_path / "a", lengths)}]), SEQ_LEN, None)

    def test_less_data_than_one_sample(self, tmp_path: Path, two_sources: list[dict]) -> None:
        short = {"path": write(tmp_path / "short", [10, 11]), "name": "short"}
        with pytest.raises(UserError, match=r"21 tokens.* fewer than one sample of train.seq_len = 32"):
            build_train_dataset(section([short]), SEQ_LEN, None)
        with pytest.raises(UserError, match=r"'short' .* has 21 tokens"):
            build_train_dataset(section([*two_sources, short], packing="concat"), SEQ_LEN, None)
        assert build_train_dataset(section([*two_sources, short]), SEQ_LEN, None).samples_per_epoch > 0

    def test_nothing_held_out(self, tmp_path: Path) -> None:
        data = section([{"path": write(tmp_path / "a", [40, 40])}], validation_fraction=1e-9)
        with pytest.raises(UserError, match="holds out none of the 2 documents"):
            build_validation_datasets(data, SEQ_LEN, None)

    def test_sample_number(self, two_sources: list[dict]) -> None:
        with pytest.raises(IndexError, match="count from 0"):
            build_train_dataset(section(two_sources), SEQ_LEN, None).segments(-1)


def build(data: DataSection) -> PackedDataset:
    return build_train_dataset(data, SEQ_LEN, vocabulary(data))


class TestTokenizer:
    def write_meta(self, prefix: Path, tokenizer: Path, special_tokens: tuple[str, ...] = ()) -> None:
        loaded = load_tokenizer(tokenizer, special_tokens)
        meta = {
            "format": FORMAT,
            "sha256": "0",
            "special_tokens": list(special_tokens),
            "tokenizer": {
                "directory": str(tokenizer),
                "vocab_size": loaded.vocab_size,
                "fingerprint": loaded.fingerprint,
            },
            "sources": [],
        }
        meta_path(prefix).write_text(json.dumps(meta))

    def test_matching(self, tmp_path: Path, sentencepiece_directory: Path) -> None:
        path = write(tmp_path / "a", [40] * 3)
        self.write_meta(path, sentencepiece_directory, ("[x]",))
        data = section([{"path": path}], tokenizer=sentencepiece_directory, special_tokens=("[x]",))
        assert build(data).microbatch([0]).tokens_T.shape == (SEQ_LEN,)

    def test_another_tokenizer_or_other_special_tokens(
        self, tmp_path: Path, sentencepiece_directory: Path, hugging_face_directory: Path
    ) -> None:
        path = write(tmp_path / "a", [40] * 3)
        self.write_meta(path, hugging_face_directory)
        with pytest.raises(UserError, match="made with another tokenizer"):
            build(section([{"path": path}], tokenizer=sentencepiece_directory))
        self.write_meta(path, sentencepiece_directory, ("[x]",))
        with pytest.raises(UserError, match=r"vocabulary 401, special tokens \['\[x\]'\]"):
            build(section([{"path": path}], tokenizer=sentencepiece_directory))

    def test_ids_beyond_the_vocabulary_are_found_while_reading(
        self, tmp_path: Path, sentencepiece_directory: Path
    ) -> None:
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            writer.add_document([5] * 40)
            writer.add_document([5] * 20 + [400])
        data = section([{"path": tmp_path / "a"}], tokenizer=sentencepiece_directory)
        dataset = build(data)
        with pytest.raises(UserError, match=r"document 1 of data source 'source0' .* token id 400.* 0..399"):
            dataset.microbatch(list(range(dataset.samples_per_epoch)))

    def test_damaged_meta(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a", [40])
        for content, message in (("{", "not valid JSON"), ("{}", "does not have the format")):
            meta_path(path).write_text(content)
            with pytest.raises(UserError, match=message):
                build_train_dataset(section([{"path": path}]), SEQ_LEN, None)


def test_documents_of_several_sequences_read_as_one(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
        writer.add_document(range(40), [10, 0, 30])
    dataset = build_train_dataset(section([{"path": tmp_path / "a"}], packing="concat"), 40, None)
    assert IndexedDataset(tmp_path / "a").num_sequences == 3
    assert dataset.microbatch([0]).tokens_T.tolist() == list(range(40))
    assert dataset.microbatch([0]).labels_T.tolist() == [*range(1, 40), 0]
