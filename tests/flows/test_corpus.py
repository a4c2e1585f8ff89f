"""From a declaration to tokens, cards, checks and removal; and what a run has seen of it, by hand-made expectations."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("datatrove")

from meditron_train.cli.main import app
from meditron_train.config.load import load_config
from meditron_train.corpus.declaration import Benchmark
from meditron_train.corpus.json_files import read_json, read_json_lines
from meditron_train.corpus.manifest import FinishedCorpus
from meditron_train.corpus.pipeline.build import build
from meditron_train.data.indexed import IndexedDataset
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.data.trace import trace_step
from meditron_train.flows.corpus.build import finish_corpus
from meditron_train.flows.corpus.check import check_corpus
from meditron_train.flows.corpus.remove import remove_documents
from tests.corpus.conftest import python_directories  # noqa: F401
from tests.corpus.pipeline.corpora import article, corpus, nearly, source, write_jsonl


def call(*words: object, code: int = 0) -> str:
    """What the command prints on stdout."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the declaration corpus.yaml, the finished corpus out/, and a run of it under runs/."""
    root = tmp_path_factory.mktemp("corpus")
    guidelines = [{"id": f"g{i}", "text": article(i), "url": f"https://example.org/{i}"} for i in range(12)]
    papers = [
        {"id": f"p{i}", "text": article(100 + i), "pmid": str(70 + i), "license": "CC-BY-SA-4.0"}
        for i in range(20)
    ]
    papers.append({"id": "copy", "text": nearly(article(3, 12), 1), "pmid": "95"})
    write_jsonl(root / "g.jsonl", guidelines)
    write_jsonl(root / "p.jsonl", papers)
    call(
        "corpus",
        "tokenizer",
        root / "g.jsonl",
        root / "p.jsonl",
        "--vocab-size",
        600,
        "--output",
        root / "tokenizer",
    )
    declared = {
        "name": "invented",
        "title": "Invented | articles",
        "output": str(root / "out"),
        "sources": [
            source("guidelines", root / "g.jsonl", "guidelines", validation=0.2, weight=2.0),
            source("papers", root / "p.jsonl", redistribution=False),
            source("absent", None, "guidelines", license="LicenseRef-X", released=False, articles=47),
        ],
        "tokenize": {
            "tokenizer": str(root / "tokenizer"),
            "special_tokens": ["[fig]", "[/fig]"],
            "check_every": 3,
        },
        "phases": [
            {"from_step": 11, "weights": {"papers": 1.0, "absent": 2.0}},
            {"from_step": 21, "weights": {"absent": 1.0}},
        ],
    }
    (root / "corpus.yaml").write_text(yaml.safe_dump(declared))
    printed = call("corpus", "build", root / "corpus.yaml", "--workers", 1)
    assert "papers: 21 documents read, 20 kept" in printed
    assert "absent: declared without a path" in printed
    section = yaml.safe_load((root / "out" / "data.yaml").read_text())
    config = {
        "model": {"from": str(root)},
        **section,
        "train": {"steps": 50, "seq_len": 64, "micro_batch_size": 2, "global_batch_size": 4},
    }
    run = root / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(1, 21)) + '{"st'
    )
    return root


def test_the_tokens_are_those_of_the_texts(built: Path) -> None:
    tokenizer = load_tokenizer(built / "tokenizer", ("[fig]", "[/fig]"))
    finished = FinishedCorpus.open(built / "out")
    total = 0
    for dataset in finished.datasets:
        tokens = IndexedDataset(dataset.tokenized)
        rows = [row for batch in dataset.rows() for row in batch.to_pylist()]
        records = list(read_json_lines(dataset.documents))
        assert len(rows) == len(records) == tokens.num_documents
        for number, (row, record) in enumerate(zip(rows, records, strict=True)):
            expected = tokenizer.encode(record["text"])
            assert tokens.document(number).tolist() == expected
            assert row["num_tokens"] == len(expected)
            total += len(expected)
    counts = [c for s in finished.manifest["sources"] for c in s["splits"].values() if c["documents"]]
    assert sum(c["tokens"] for c in counts) == total


def test_the_data_section_trains_on_it(built: Path) -> None:
    data = load_config(built / "runs" / "first" / "config.yaml").data
    tokens = {
        source["name"]: source["splits"]["train"].get("tokens")
        for source in read_json(built / "out" / "manifest.json")["sources"]
    }
    assert {source.name: source.weight for source in data.train} == {
        "guidelines": 2 * tokens["guidelines"],
        "papers": tokens["papers"],
    }
    assert [source.name for source in data.validation] == ["guidelines"]


def test_the_phases_are_those_of_a_training_configuration(built: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((built / "runs" / "first" / "config.yaml").read_text())
    config["data"] |= yaml.safe_load((built / "out" / "phases.yaml").read_text())["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (phase,) = load_config(tmp_path / "config.yaml").data.phases
    assert (phase.from_step, phase.weights) == (11, {"papers": 1.0})


def test_building_again_changes_nothing(built: Path) -> None:
    before = (built / "out" / "manifest.json").read_bytes()
    call("corpus", "build", built / "corpus.yaml", "--workers", 1)
    assert (built / "out" / "manifest.json").read_bytes() == before


def test_cards(built: Path) -> None:
    call("corpus", "card", built / "out", "--output", built / "card")
    page, markdown = (built / "card" / "card.html").read_text(), (built / "card" / "card.md").read_text()
    for text in (page, markdown):
        assert "near-duplicates" in text and "40,700,000,000" in text and "LicenseRef-X" in text
    assert "<svg" in page and "not released, not given here" in page
    assert "http" not in page.replace("https://example.org", "").split("<h2>Citations")[0]
    header = yaml.safe_load((built / "card" / "README.md").read_text().split("---\n")[1])
    assert {config["config_name"] for config in header["configs"]} == {"guidelines", "papers"}
    assert "**Not to be redistributed:** papers." in (built / "card" / "README.md").read_text()


def test_licenses_are_those_of_the_documents(built: Path) -> None:
    finished = FinishedCorpus.open(built / "out")
    guidelines, papers, absent = finished.manifest["sources"]
    rows = [r for d in finished.datasets if d.source == "papers" for b in d.rows() for r in b.to_pylist()]
    tokens = sum(row["num_tokens"] for row in rows)
    assert papers["license"] == "CC-BY-4.0"  # of documents that state none: the only one was a duplicate
    assert papers["licenses"] == {"CC-BY-SA-4.0": {"documents": 20, "tokens": tokens}}
    assert list(guidelines["licenses"]) == ["CC-BY-4.0"] and absent["licenses"] == {}
    call("corpus", "card", built / "out", "--output", built / "card")
    assert f"| papers | CC-BY-SA-4.0 | 20 | {tokens:,} |" in (built / "card" / "card.md").read_text()
    described = read_json(built / "card" / "croissant.json")["license"]
    assert described == [f"https://spdx.org/licenses/{name}.html" for name in ("CC-BY-4.0", "CC-BY-SA-4.0")]


def test_croissant_is_valid(built: Path) -> None:
    croissant = pytest.importorskip("mlcroissant")
    call("corpus", "card", built / "out", "--output", built / "card")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = croissant.Dataset(jsonld=str(built / "card" / "croissant.json"))
    assert dataset.metadata.issues.errors == set()
    names = {record_set.name for record_set in dataset.metadata.record_sets}
    assert names == {"guidelines.train", "guidelines.validation", "papers.train"}


def test_check_finds_nothing_in_a_whole_corpus(built: Path) -> None:
    report = json.loads(call("corpus", "check", built / "out", "--json"))
    assert report["ok"] and report["changed_files"] == [] and report["retracted"] == []


def test_check_finds_changed_files(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "out", tmp_path / "out")
    with open(tmp_path / "out" / "tokenized" / "papers.train.bin", "r+b") as file:
        file.write(b"\xff")
    (tmp_path / "out" / "problems.jsonl").unlink()
    printed = call("corpus", "check", tmp_path / "out", code=1)
    assert "tokenized/papers.train.bin: changed" in printed and "problems.jsonl: missing" in printed


def expected_steps(run: Path, name: str, doc_id: str) -> list[int]:
    """By tracing every step."""
    return [
        step
        for step in range(1, 21)
        if any(s["source"] == name and s["id"] == doc_id for s in trace_step(run, step)["segments"])
    ]


def test_check_finds_retractions_and_the_steps_that_saw_them(built: Path, tmp_path: Path) -> None:
    medline = tmp_path / "pubmed26n1400.xml"
    medline.write_text(
        '<?xml version="1.0"?><PubmedArticleSet><PubmedArticle><MedlineCitation><PMID Version="1">75</PMID>'
        "<Article><ArticleTitle>Retracted</ArticleTitle><Abstract><AbstractText>No.</AbstractText></Abstract>"
        "<PublicationTypeList><PublicationType>Retracted Publication</PublicationType></PublicationTypeList>"
        "</Article></MedlineCitation></PubmedArticle>"
        '<DeleteCitation><PMID Version="1">81</PMID><PMID Version="1">999</PMID></DeleteCitation></PubmedArticleSet>'
    )
    pmc = write_jsonl(
        tmp_path / "pmc.jsonl", [{"pmid": 77, "is_retracted": True}, {"pmid": 78, "is_retracted": False}]
    )
    words = ["--retractions", medline, "--retractions", pmc, "--runs", built / "runs", "--json"]
    report = json.loads(call("corpus", "check", built / "out", *words, code=1))
    found = {row["id"]: row["why"].split(" according")[0] for row in report["retracted"]}
    assert found == {"p5": "retracted", "p11": "deleted", "p7": "retracted"}
    (run,) = report["runs"]
    for document in run["documents"]:
        assert document["steps"] == expected_steps(built / "runs" / "first", "papers", document["id"])
    assert any(document["steps"] for document in run["documents"])


def test_runs_with_relative_paths_are_not_left_out(built: Path, tmp_path: Path) -> None:
    """Paths of a run are those of the directory where it was started, and may be links into the corpus."""
    first = built / "runs" / "first"
    config = yaml.safe_load((first / "config.yaml").read_text())
    (tmp_path / "data").mkdir()
    for declared in config["data"]["train"] + config["data"]["validation"]:
        prefix = Path(declared["path"])
        for path in prefix.parent.glob(f"{prefix.name}.*"):
            (tmp_path / "data" / path.name).unlink(missing_ok=True)
            (tmp_path / "data" / path.name).symlink_to(path)
        declared["path"] = f"data/{prefix.name}"
    run = shutil.copytree(first, tmp_path / "runs" / "first")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "provenance.jsonl").write_text(json.dumps({"working_directory": str(tmp_path)}) + "\n")
    pmc = write_jsonl(tmp_path / "pmc.jsonl", [{"pmid": 77, "is_retracted": True}])
    words = ["--retractions", pmc, "--runs", tmp_path / "runs", "--json"]
    (report,) = json.loads(call("corpus", "check", built / "out", *words, code=1))["runs"]
    (document,) = report["documents"]
    assert document["steps"] == expected_steps(first, "papers", "p7") != []
    assert "CC-BY-SA-4.0" in call("data", "trace", run, "--step", 2)
    shutil.rmtree(tmp_path / "data")
    (report,) = json.loads(call("corpus", "check", built / "out", *words, code=1))["runs"]
    assert "is neither here nor where the run was started" in report["unknown"]


def test_check_finds_what_stands_for_a_retracted_duplicate(built: Path, tmp_path: Path) -> None:
    pmc = write_jsonl(tmp_path / "pmc.jsonl", [{"pmid": 95, "is_retracted": True}])
    words = ["--retractions", pmc, "--runs", built / "runs", "--json"]
    (row,) = json.loads(call("corpus", "check", built / "out", *words, code=1))["retracted"]
    assert (row["source"], row["id"]) == ("guidelines", "g3")
    assert row["why"] == f"stands for papers copy, retracted according to {pmc}"


def test_check_says_which_retractions_it_cannot_read(built: Path, tmp_path: Path) -> None:
    articles = "".join(
        f'<PubmedArticle><MedlineCitation><PMID Version="1">{number}</PMID><Article><ArticleTitle>No. {number}'
        "</ArticleTitle></Article></MedlineCitation></PubmedArticle>"
        for number in range(900, 1400)
    )
    whole = gzip.compress(f"<PubmedArticleSet>{articles}</PubmedArticleSet>".encode())
    (tmp_path / "pubmed26n1401.xml.gz").write_bytes(whole)
    words = ["--retractions", tmp_path, "--runs", tmp_path, "--json"]
    assert json.loads(call("corpus", "check", built / "out", *words))["ok"]
    (tmp_path / "pubmed26n1401.xml.gz").write_bytes(whole[: len(whole) // 2])
    report = json.loads(call("corpus", "check", built / "out", *words, code=1))
    (problem,) = report["problems"]
    assert (problem["file"], problem["reason"]) == (str(tmp_path / "pubmed26n1401.xml.gz"), "truncated")
    assert not report["ok"] and report["retracted"] == []
    assert "truncated" in call("corpus", "check", built / "out", *words[:-1], code=1)


def test_check_looks_for_further_benchmarks(built: Path, tmp_path: Path) -> None:
    asked = " ".join(article(104).split()[3:25])
    quiz = write_jsonl(
        tmp_path / "my new quiz.jsonl",
        [{"stem": asked}, {"stem": "what nobody has ever written down in a text"}],
    )
    report = json.loads(
        call(
            "corpus",
            "check",
            built / "out",
            "--benchmark",
            quiz,
            "--key",
            "stem",
            "--runs",
            tmp_path,
            "--json",
            code=1,
        )
    )
    assert {(hit["id"], hit["item"], hit["rule"]) for hit in report["contamination"]} == {
        ("p4", "1", "ngram"),
        ("p4", "1", "aligned"),
    }


@pytest.mark.long
def test_check_uses_the_rules_of_the_declaration(tmp_path: Path) -> None:
    quiz = write_jsonl(
        tmp_path / "quiz.jsonl",
        [{"question": " ".join(article(1).split()[4:10]) + " and a few words more than the text has"}],
    )
    found = {}
    for n in (5, 13):
        texts = write_jsonl(tmp_path / f"{n}.jsonl", [{"id": "d", "text": article(1)}])
        rules = {"ngram": {"n": n}, "aligned": {"enabled": False}}
        declared = corpus(tmp_path / f"out{n}", [source("texts", texts)], decontamination=rules)
        finish_corpus(FinishedCorpus.open(build(declared) and declared.output), declared, workers=1)
        report = check_corpus(declared.output, benchmarks=[Benchmark(name="quiz", path=quiz)])
        found[n] = [hit["rule"] for hit in report["contamination"]]
    assert found == {5: ["ngram"], 13: []}


def test_trace_tells_license_and_url(built: Path) -> None:
    traced = json.loads(call("data", "trace", built / "runs" / "first", "--step", 2, "--json"))
    seen: dict[str, Any] = {segment["id"]: segment["corpus"] for segment in traced["segments"]}
    for doc_id, origin in seen.items():
        if doc_id.startswith("g"):
            url = f"https://example.org/{doc_id[1:]}"
            assert origin == {"source": "guidelines", "license": "CC-BY-4.0", "url": url}
        else:
            assert origin == {"source": "papers", "license": "CC-BY-SA-4.0", "url": None}
    assert {doc_id[0] for doc_id in seen} == {"g", "p"}
    assert "CC-BY-SA-4.0" in call("data", "trace", built / "runs" / "first", "--step", 2)


def test_remove(built: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("p5\npapers\tp6\nguidelines\tp7\nunknown\n")
    words = ["--ids", ids, "--output", tmp_path / "less", "--runs", built / "runs", "--workers", 1, "--json"]
    report = json.loads(call("corpus", "remove", built / "out", *words))
    assert report["removed"] == [{"id": "p5", "source": "papers"}, {"id": "p6", "source": "papers"}]
    assert report["not_found"] == ["p7", "unknown"]
    (run,) = report["runs"]
    assert {d["id"]: d["steps"] for d in run["documents"]} == {
        doc_id: expected_steps(built / "runs" / "first", "papers", doc_id) for doc_id in ("p5", "p6")
    }
    less, whole = FinishedCorpus.open(tmp_path / "less"), FinishedCorpus.open(built / "out")
    for before, after in zip(whole.datasets, less.datasets, strict=True):
        kept = [r for r in read_json_lines(before.documents) if r["id"] not in ("p5", "p6")]
        assert list(read_json_lines(after.documents)) == kept
        tokens = IndexedDataset(after.tokenized)
        rows = [row for batch in after.rows() for row in batch.to_pylist()]
        assert [row["id"] for row in rows] == [record["id"] for record in kept]
        assert tokens.document_lengths.tolist() == [row["num_tokens"] for row in rows]
    papers = less.manifest["sources"][1]
    assert papers["dropped"]["removed"] == 2 and papers["splits"]["train"]["documents"] == 18
    assert json.loads(call("corpus", "check", tmp_path / "less", "--json"))["ok"]
    assert json.loads(call("corpus", "check", built / "out", "--json"))["ok"]  # the old one is untouched
    call("corpus", "remove", built / "out", "--ids", ids, "--output", tmp_path / "less", code=2)


def test_remove_takes_what_stands_for_a_duplicate(built: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("copy\np5\n")
    words = ["--ids", ids, "--output", tmp_path / "less", "--runs", tmp_path, "--workers", 1, "--json"]
    report = json.loads(call("corpus", "remove", built / "out", *words))
    assert report["removed"] == [
        {"id": "g3", "source": "guidelines", "stood_for": [{"id": "copy", "source": "papers"}]},
        {"id": "p5", "source": "papers"},
    ]
    assert report["not_found"] == []
    less = FinishedCorpus.open(tmp_path / "less")
    kept = {record["id"] for dataset in less.datasets for record in read_json_lines(dataset.documents)}
    assert "g4" in kept and not {"g3", "p5", "copy"} & kept
    gone = [r for r in read_json_lines(less.root / "dropped.jsonl.zst") if r["rule"] == "removed"]
    assert gone[1] == {"id": "p5", "source": "papers", "rule": "removed", "pmid": "75"}
    ids.write_text("copy\n")  # whose text is gone now
    words[3] = tmp_path / "again"
    call("corpus", "remove", tmp_path / "less", *words, code=2)


@pytest.mark.long
def test_remove_forgets_the_contamination_of_what_it_removes(tmp_path: Path) -> None:
    questions = [{"id": f"q{i}", "question": " ".join(article(i).split()[:20])} for i in (1, 2, 3)]
    quiz = write_jsonl(tmp_path / "quiz.jsonl", questions)
    texts = write_jsonl(tmp_path / "t.jsonl", [{"id": f"d{i}", "text": article(i)} for i in (1, 2, 4)])
    rules = {"benchmarks": [{"name": "quiz", "path": str(quiz)}], "action": "flag"}
    declared = corpus(tmp_path / "out", [source("texts", texts)], decontamination=rules)
    finish_corpus(FinishedCorpus.open(build(declared) and declared.output), declared, workers=1)
    (tmp_path / "ids.txt").write_text("d2\n")
    remove_documents(tmp_path / "out", tmp_path / "ids.txt", tmp_path / "less")
    (before,) = FinishedCorpus.open(tmp_path / "out").manifest["benchmarks"]
    (after,) = FinishedCorpus.open(tmp_path / "less").manifest["benchmarks"]
    assert (before["touched"], before["documents"], before["items"]) == (2, 2, 3)
    assert after == before | {
        "touched": 1,
        "touched_by_rule": {"ngram": 1, "aligned": 1},
        "touched_share": 1 / 3,
        "documents": 1,
    }
    assert {hit["id"] for hit in read_json_lines(tmp_path / "less" / "contamination.jsonl")} == {"d1"}
    assert check_corpus(tmp_path / "less")["ok"]


def test_remove_everything_of_a_source(built: Path, tmp_path: Path) -> None:
    """Nothing is left of it, neither files nor tokens; and what was removed tells one corpus from another."""
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"papers\tp{i}\n" for i in range(20)))
    words = ["--runs", tmp_path, "--workers", 1, "--json"]
    call("corpus", "remove", built / "out", "--ids", ids, "--output", tmp_path / "none", *words)
    less = FinishedCorpus.open(tmp_path / "none")
    papers = less.manifest["sources"][1]
    assert papers["splits"]["train"] == {"documents": 0, "chars": 0, "bytes": 0, "tokens": 0}
    assert papers["licenses"] == {}
    assert not [name for name in less.manifest["files"] if "papers" in name]
    assert [
        entry["name"] for entry in yaml.safe_load((less.root / "data.yaml").read_text())["data"]["train"]
    ] == ["guidelines"]
    assert json.loads(call("corpus", "check", tmp_path / "none", "--json"))["ok"]
    fingerprints = set()
    for number in (1, 2):
        ids.write_text(f"p{number}\n")
        output = tmp_path / f"without-{number}"
        call("corpus", "remove", built / "out", "--ids", ids, "--output", output, *words)
        fingerprints.add(FinishedCorpus.open(output).manifest["fingerprint"])
    assert len(fingerprints) == 2


def test_the_tokenizer_is_the_same_each_time(built: Path, tmp_path: Path) -> None:
    words = ["--vocab-size", 600, "--output", tmp_path / "again"]
    call("corpus", "tokenizer", built / "g.jsonl", built / "p.jsonl", *words)
    models = [directory / "tokenizer.model" for directory in (tmp_path / "again", built / "tokenizer")]
    assert models[0].read_bytes() == models[1].read_bytes()
    call("corpus", "tokenizer", built / "g.jsonl", *words, code=2)  # one is there already


def test_wrong_input(built: Path, tmp_path: Path) -> None:
    for words in (
        ("corpus", "check", tmp_path),
        ("corpus", "card", built / "runs"),
        ("corpus", "remove", built / "out", "--ids", tmp_path / "no"),
        ("corpus", "check", built / "out", "--retractions", tmp_path / "no.xml"),
        ("corpus", "tokenizer", built / "g.jsonl", "--vocab-size", "100", "--output", tmp_path / "t"),
        ("corpus", "tokenizer", built / "g.jsonl", "--vocab-size", "90000", "--output", tmp_path / "t"),
    ):
        call(*words, code=2)
