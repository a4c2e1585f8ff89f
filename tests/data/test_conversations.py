"""Conversations in packed samples: which labels weigh what, that none is cut, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meditron_train.config.data import DataSection
from meditron_train.data.meta import FORMAT, loss_mask_path, meta_path
from meditron_train.data.packed import PackedDataset, build_train_dataset, build_validation_datasets
from meditron_train.data.sources import Vocabulary
from meditron_train.data.tokenizing.chat import ChatTemplate
from meditron_train.errors import UserError
from tests.data.indexed_writer import IndexedDatasetWriter

SEQ_LEN = 32
TEMPLATE = ChatTemplate("chatml", "source", ())
VOCAB = Vocabulary("none", 300, "fingerprint", (), TEMPLATE)


def write(prefix: Path, lengths: list[int], *, seed: int = 0, chat: bool = True) -> Path:
    """Documents of these lengths; of conversations the second half is the answer."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in lengths:
            writer.add_document(generator.integers(0, 300, length))
    meta: dict[str, Any] = {
        "format": FORMAT,
        "sha256": "0",
        "special_tokens": [],
        "tokenizer": {"directory": "none", "vocab_size": 300, "fingerprint": "fingerprint"},
        "sources": [],
    }
    if chat:
        mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths]).astype(np.uint8)
        mask.tofile(loss_mask_path(prefix))
        meta["chat"] = {
            "template": "chatml",
            "template_sha256": TEMPLATE.sha256,
            "loss_tokens": int(mask.sum()),
            "loss_mask_sha256": str(mask.tobytes()[:8]),
        }
    meta_path(prefix).write_text(json.dumps(meta))
    return prefix


def section(*paths: Path, **chat: Any) -> DataSection:
    train = [{"path": str(path)} for path in paths]
    return DataSection.model_validate({"tokenizer": "none", "seed": 1, "train": train, "chat": chat})


def build(data: DataSection) -> PackedDataset:
    return build_train_dataset(data, SEQ_LEN, VOCAB)


def expected_weights(dataset: PackedDataset, number: int, prompt_weight: float) -> list[float]:
    """Label by label from the files."""
    weights: list[float] = []
    for segment in dataset.segments(number):
        source = dataset.sources[segment.source].dataset
        first = int(source.document_lengths[: segment.document].sum())
        for place in range(segment.start, segment.start + segment.length):
            is_last = place + 1 == source.document_lengths[segment.document]
            is_answer = source.loss_mask is None or bool(not is_last and source.loss_mask[first + place + 1])
            weights.append(0.0 if is_last else 1.0 if is_answer else prompt_weight)
    return weights + [0.0] * (SEQ_LEN - len(weights))


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_labels_weigh_what_the_mask_says(tmp_path: Path, prompt_weight: float) -> None:
    lengths = np.random.default_rng(5).integers(2, SEQ_LEN + 1, 60).tolist()
    paths = write(tmp_path / "chat", lengths), write(tmp_path / "text", lengths, seed=1, chat=False)
    dataset = build(section(*paths, prompt_loss_weight=prompt_weight))
    seen: set[float] = set()
    for first in range(0, 40, 2):
        batch = dataset.microbatch([first, first + 1])
        expected = [w for n in (first, first + 1) for w in expected_weights(dataset, n, prompt_weight)]
        assert batch.loss_mask_T.float().tolist() == expected
        seen |= set(expected)
    assert seen == {0.0, prompt_weight, 1.0}


def test_no_conversation_is_cut(tmp_path: Path) -> None:
    lengths = np.random.default_rng(6).integers(2, SEQ_LEN + 1, 60).tolist()
    dataset = build(section(write(tmp_path / "chat", lengths)))
    seen = sorted(s for n in range(dataset.samples_per_epoch) for s in map(tuple_of, dataset.segments(n)))
    assert seen == [(document, 0, length) for document, length in enumerate(lengths)]


def tuple_of(segment: Any) -> tuple[int, int, int]:
    return segment.document, segment.start, segment.length


LENGTHS = [
    10,
    SEQ_LEN,
    SEQ_LEN + 1,
    2 * SEQ_LEN,
    3 * SEQ_LEN,
]  # the answer of the last one begins beyond the sample


@pytest.mark.parametrize(
    ("too_long", "used", "message"),
    [
        (
            "drop",
            [(0, 10), (1, 32)],
            "3 of 5 conversations are longer than train.seq_len = 32 tokens .* 96.: dropped",
        ),
        ("truncate", [(0, 10), (1, 32), (2, 32), (3, 32)], "truncated, 1 dropped as no answer is left"),
    ],
)
def test_too_long(
    tmp_path: Path, too_long: str, used: list, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "chat", LENGTHS)
    data = section(path, too_long=too_long)
    dataset = build(data)
    assert any(re.search(message, text) for text in caplog.messages), caplog.messages
    segments = sorted(s for n in range(dataset.samples_per_epoch) for s in map(tuple_of, dataset.segments(n)))
    assert segments == [(document, 0, length) for document, length in used]
    for number in range(dataset.samples_per_epoch):
        assert dataset.microbatch([number]).loss_mask_T.float().tolist() == expected_weights(
            dataset, number, 0.0
        )
    assert dataset.num_tokens == sum(length for _, length in used)
    other = section(path, too_long="drop" if too_long == "truncate" else "truncate")
    assert build(other).fingerprint != dataset.fingerprint


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    data = section(write(tmp_path / "chat", [10, 20, 30]))
    before = build(data).fingerprint
    meta = json.loads(meta_path(tmp_path / "chat").read_text())
    meta["chat"]["loss_mask_sha256"] = "other"
    meta_path(tmp_path / "chat").write_text(json.dumps(meta))
    assert build(data).fingerprint != before


def test_validation_too(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name, [10, 20, 40])) for name in ("train", "validation")]
    values = {
        "tokenizer": "none",
        "train": [{"path": paths[0]}],
        "validation": [{"path": paths[1]}],
        "chat": {},
    }
    dataset = build_validation_datasets(DataSection.model_validate(values), SEQ_LEN, VOCAB)["validation"]
    weights = [
        w for n in range(dataset.samples_per_epoch) for w in dataset.microbatch([n]).loss_mask_T.tolist()
    ]
    assert sum(weights) == 5 + 10


def test_what_is_refused(tmp_path: Path) -> None:
    path, text = write(tmp_path / "chat", [10, 20, 30]), write(tmp_path / "text", [40], chat=False)
    plain = DataSection.model_validate({"tokenizer": "none", "train": [{"path": str(path)}]})
    with pytest.raises(UserError, match=r"holds conversations, .* write data.chat: \{template: chatml\}"):
        build(plain)
    other = Vocabulary("none", 300, "fingerprint", (), ChatTemplate("chatml", "another", ()))
    with pytest.raises(UserError, match="was rendered by another chat template: 'chatml' with the hash"):
        build_train_dataset(section(path), SEQ_LEN, other)
    with pytest.raises(UserError, match=r"no training source holds conversations \(text\)"):
        build(section(text))
    with pytest.raises(ValueError, match="chat needs packing: best_fit"):
        DataSection.model_validate(
            {"tokenizer": "none", "train": [{"path": "a"}], "chat": {}, "packing": "concat"}
        )
    mask = loss_mask_path(path)
    content = mask.read_bytes()
    mask.write_bytes(content[:-1])
    with pytest.raises(UserError, match="marks 59 tokens, but .* has 60"):
        build(section(path))
    mask.unlink()
    with pytest.raises(UserError, match="which marks their answers, is missing"):
        build(section(path))
    mask.write_bytes(content)
    meta_path(path).unlink()
    with pytest.raises(
        UserError, match="marks the answers of conversations, but .* is missing or of other data"
    ):
        build(section(path))


def test_chatml_adds_its_tokens() -> None:
    values = {
        "tokenizer": "none",
        "train": [{"path": "a"}],
        "special_tokens": ["[x]", "<|im_end|>"],
        "chat": {},
    }
    assert DataSection.model_validate(values).special_tokens == ("[x]", "<|im_end|>", "<|im_start|>")
    own = {**values, "chat": {"template": "tokenizer"}}
    assert DataSection.model_validate(own).special_tokens == ("[x]", "<|im_end|>")
