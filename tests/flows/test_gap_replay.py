"""The declarations of GAP-Replay from their sources to a training configuration, on the small files of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("datatrove")

from meditron_train.cli.main import app
from meditron_train.config.load import load_config
from meditron_train.corpus.declaration import load_corpus
from meditron_train.corpus.json_files import read_json
from meditron_train.corpus.text.rules import SPECIAL_TOKENS
from meditron_train.data.indexed import IndexedDataset
from tests.corpus.conftest import python_directories  # noqa: F401

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "corpus" / "fixtures"
SOURCES = {"GUIDELINES": "guidelines.jsonl", "PMC": "pmc", "MEDLINE": "medline", "REPLAY": "web.jsonl"}


def call(*words: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + str(result.exception)


def test_annealing_from_sources_to_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus of gap-replay-annealing.yaml is what configs/meditron-7b.yaml trains on with its data.yaml."""
    words = ["--vocab-size", 500, "--output", tmp_path / "tokenizer"]
    call("corpus", "tokenizer", FIXTURES / "web.jsonl", *words)
    for name in ("medqa", "medmcqa", "pubmedqa", "mmlu-medical", "medxpertqa"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"question": "which dose of the drug is right"}) + "\n"
        )
    for name, file in SOURCES.items():
        monkeypatch.setenv(name, str(FIXTURES / file))
    monkeypatch.setenv("BENCHMARKS", str(tmp_path))
    monkeypatch.setenv("TOKENIZER", str(tmp_path / "tokenizer"))
    monkeypatch.setenv("CORPUS_OUTPUT", str(tmp_path / "out"))
    monkeypatch.delenv("S2ORC", raising=False)
    call("corpus", "build", ROOT / "configs/corpus/gap-replay-annealing.yaml", "--workers", 1)
    sources = {source["name"]: source for source in read_json(tmp_path / "out" / "manifest.json")["sources"]}
    assert [sources[name]["splits"]["train"]["documents"] for name in ("who", "cdc", "s2orc")] == [1, 1, 0]
    # Six sources share the file with them; what nobody selects is counted once.
    assert [name for name, source in sources.items() if source["not_selected"]] == ["cco"]
    overrides = [f"data=@{tmp_path}/out/{name}.yaml" for name in ("data", "phases")]
    config = load_config(ROOT / "configs/meditron-7b.yaml", overrides)
    assert config.data.special_tokens == SPECIAL_TOKENS and config.data.packing == "concat"
    declared = load_corpus(ROOT / "configs/corpus/gap-replay-annealing.yaml")
    (annealing,), (expected,) = config.data.phases, declared.phases
    assert set(expected.weights) == {source.name for source in declared.sources}
    assert all(expected.weights.values())
    names = {source.name for source in config.data.train}
    assert names >= {"who", "cdc", "pmc", "replay"}
    assert annealing.weights == {name: expected.weights[name] for name in names}
    # Before it, the whole mixture: every source by its tokens, but for the replay, which has a budget.
    assert 0.89 * config.train.steps < annealing.from_step < config.train.steps
    weights = {source.name: source.weight for source in config.data.train}
    counted = {name: sources[name]["splits"]["train"]["tokens"] for name in names}
    assert weights == {**counted, "replay": 420_000_000}
    guidelines = {source.name for source in declared.sources if source.part == "guidelines"}
    shares = expected.weights
    assert 0.09 < sum(shares[name] for name in guidelines) / sum(shares.values()) < 0.11
    for source in config.data.train:
        assert IndexedDataset(source.path).num_documents > 0
