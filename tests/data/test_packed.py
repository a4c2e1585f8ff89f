from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meditron_train.data.indexed import IndexedDataset, IndexedDatasetWriter
from meditron_train.data.meta import FORMAT, meta_path
from meditron_train.data.packed import PackedDataset, Segment, build_train_dataset, build_validation_datasets
from meditron_train.data.tokenizer import load_tokenizer
from meditron_train.errors import UserError

SEQ_LEN = 32


def write(prefix: Path, lengths: list[int], seed: int = 0, vocab_size: int = 300) -> Path:
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in lengths:
            writer.add_document(generator.integers(0, vocab_size, length))
    return prefix


def section(train: list, **changes: object) -> SimpleNamespace:
    entries = [
        SimpleNamespace(**({"name": f"source{i}", "weight": 1.0, "token_budget": None} | entry))
        for i, entry in enumerate(train)
    ]
    values = {
        "tokenizer": None,
        "packing": "best_fit",
        "seed": 1,
        "special_tokens": (),
        "train": entries,
        "validation": (),
        "validation_fraction": 0.0,
        "cache_dir": None,
    }
    return SimpleNamespace(**(values | changes))


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
    dataset = build_train_dataset(section(two_sources, packing=packing), SEQ_LEN)
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
    dataset = build_train_dataset(data, SEQ_LEN)
    for epoch in (0, 1):
        first = epoch * dataset.samples_per_epoch
        segments = [s for n in range(dataset.samples_per_epoch) for s in dataset.segments(first + n)]
        tokens = sorted((s.document, s.start + i) for s in segments for i in range(s.length))
        assert tokens == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    assert dataset.num_tokens == sum(lengths)


def test_sources_keep_their_weight_at_every_prefix(two_sources: list[dict]) -> None:
    two_sources[0]["weight"], two_sources[1]["weight"] = 0.7, 0.3
    dataset = build_train_dataset(section(two_sources), SEQ_LEN)
    second = 0
    for number in range(1000):
        second += dataset.segments(number)[0].source == 1
        assert abs(second - 0.3 * (number + 1)) < 1 + 1e-9


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_token_budgets_are_shares_of_tokens(two_sources: list[dict], packing: str) -> None:
    two_sources[0] |= {"token_budget": 300_000, "weight": None}
    two_sources[1] |= {"token_budget": 100_000, "weight": None}
    dataset = build_train_dataset(section(two_sources, packing=packing), SEQ_LEN)
    tokens = [0, 0]
    for number in range(12 * dataset.samples_per_epoch):
        for segment in dataset.segments(number):
            tokens[segment.source] += segment.length
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


def test_order_depends_on_seed_and_name_not_on_path(two_sources: list[dict], tmp_path: Path) -> None:
    first = build_train_dataset(section(two_sources), SEQ_LEN)
    moved = [{"path": tmp_path / "moved" / entry["path"].name} for entry in two_sources]
    (tmp_path / "moved").mkdir()
    for entry in two_sources:
        for suffix in ("idx", "bin"):
            name = f"{entry['path'].name}.{suffix}"
            (tmp_path / name).rename(tmp_path / "moved" / name)
    second = build_train_dataset(section(moved), SEQ_LEN)
    assert first.fingerprint == second.fingerprint
    assert [first.segments(n) for n in range(40)] == [second.segments(n) for n in range(40)]
    other = build_train_dataset(section(moved, seed=2), SEQ_LEN)
    assert [first.segments(n) for n in range(40)] != [other.segments(n) for n in range(40)]


def test_fingerprint_covers_what_the_order_depends_on(two_sources: list[dict], tmp_path: Path) -> None:
    def fingerprint(train: list[dict] = two_sources, seq_len: int = SEQ_LEN, **changes: object) -> str:
        return build_train_dataset(section(train, **changes), seq_len).fingerprint

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
    extra = SimpleNamespace(name="extra", path=write(tmp_path / "extra", [3, 4]))
    data = section(two_sources, validation_fraction=0.2, validation=[extra])
    train, validation = build_train_dataset(data, SEQ_LEN), build_validation_datasets(data, SEQ_LEN)
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


def test_segments_are_plain_values(two_sources: list[dict]) -> None:
    segment = build_train_dataset(section(two_sources), SEQ_LEN).segments(0)[0]
    assert isinstance(segment, Segment)
    assert all(type(value) is int for value in astuple(segment))


class TestBadInput:
    def test_empty_dataset(self, tmp_path: Path) -> None:
        for lengths in ([], [0, 0]):
            with pytest.raises(UserError, match=r"'source0' .* is empty"):
                build_train_dataset(section([{"path": write(tmp_path / "a", lengths)}]), SEQ_LEN)

    def test_less_data_than_one_sample(self, tmp_path: Path, two_sources: list[dict]) -> None:
        short = {"path": write(tmp_path / "short", [10, 11]), "name": "short"}
        with pytest.raises(UserError, match=r"21 tokens.* fewer than one sample of train.seq_len = 32"):
            build_train_dataset(section([short]), SEQ_LEN)
        with pytest.raises(UserError, match=r"'short' .* has 21 tokens"):
            build_train_dataset(section([*two_sources, short], packing="concat"), SEQ_LEN)
        assert build_train_dataset(section([*two_sources, short]), SEQ_LEN).samples_per_epoch > 0

    @pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
    def test_weight(self, two_sources: list[dict], weight: float) -> None:
        two_sources[1]["weight"] = weight
        with pytest.raises(UserError, match="'source1' has the weight"):
            build_train_dataset(section(two_sources), SEQ_LEN)

    def test_budgets(self, two_sources: list[dict]) -> None:
        two_sources[0]["token_budget"] = 100
        with pytest.raises(UserError, match="not for source1"):
            build_train_dataset(section(two_sources), SEQ_LEN)
        two_sources[1]["token_budget"] = 0
        with pytest.raises(UserError, match="'source1' has the token_budget 0"):
            build_train_dataset(section(two_sources), SEQ_LEN)

    def test_names(self, two_sources: list[dict]) -> None:
        two_sources[0]["name"] = "source1"
        with pytest.raises(UserError, match="used twice: source1"):
            build_train_dataset(section(two_sources), SEQ_LEN)
        with pytest.raises(UserError, match="names no source"):
            build_train_dataset(section([]), SEQ_LEN)

    def test_nothing_held_out(self, tmp_path: Path) -> None:
        data = section([{"path": write(tmp_path / "a", [40, 40])}], validation_fraction=1e-9)
        with pytest.raises(UserError, match="holds out none of the 2 documents"):
            build_validation_datasets(data, SEQ_LEN)

    def test_sample_number(self, two_sources: list[dict]) -> None:
        with pytest.raises(IndexError, match="count from 0"):
            build_train_dataset(section(two_sources), SEQ_LEN).segments(-1)


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
        assert build_train_dataset(data, SEQ_LEN).microbatch([0]).tokens_T.shape == (SEQ_LEN,)

    def test_another_tokenizer_or_other_special_tokens(
        self, tmp_path: Path, sentencepiece_directory: Path, hugging_face_directory: Path
    ) -> None:
        path = write(tmp_path / "a", [40] * 3)
        self.write_meta(path, hugging_face_directory)
        with pytest.raises(UserError, match="made with another tokenizer"):
            build_train_dataset(section([{"path": path}], tokenizer=sentencepiece_directory), SEQ_LEN)
        self.write_meta(path, sentencepiece_directory, ("[x]",))
        with pytest.raises(UserError, match=r"vocabulary 401, special tokens \['\[x\]'\]"):
            build_train_dataset(section([{"path": path}], tokenizer=sentencepiece_directory), SEQ_LEN)

    def test_ids_beyond_the_vocabulary_are_found_while_reading(
        self, tmp_path: Path, sentencepiece_directory: Path
    ) -> None:
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            writer.add_document([5] * 40)
            writer.add_document([5] * 20 + [400])
        data = section([{"path": tmp_path / "a"}], tokenizer=sentencepiece_directory)
        dataset = build_train_dataset(data, SEQ_LEN)
        with pytest.raises(UserError, match=r"Document 1 of data source 'source0' .* token id 400.* 0..399"):
            dataset.microbatch(list(range(dataset.samples_per_epoch)))

    def test_damaged_meta(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a", [40])
        for content, message in (("{", "not valid JSON"), ("{}", "does not have the format")):
            meta_path(path).write_text(content)
            with pytest.raises(UserError, match=message):
                build_train_dataset(section([{"path": path}]), SEQ_LEN)


def test_documents_of_several_sequences_read_as_one(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
        writer.add_document(range(40), [10, 0, 30])
    dataset = build_train_dataset(section([{"path": tmp_path / "a"}], packing="concat"), 40)
    assert IndexedDataset(tmp_path / "a").num_sequences == 3
    assert dataset.microbatch([0]).tokens_T.tolist() == list(range(40))
    assert dataset.microbatch([0]).labels_T.tolist() == [*range(1, 40), 0]
