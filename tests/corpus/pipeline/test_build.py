"""The whole pipeline: planted duplicates and contamination are found, everything else stays, problems are reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from meditron_train.corpus.declaration import Corpus
from meditron_train.corpus.json_files import read_json_lines
from meditron_train.corpus.manifest import FinishedCorpus
from meditron_train.corpus.pipeline.build import build
from meditron_train.corpus.pipeline.execute import Execution
from meditron_train.corpus.pipeline.plan import Plan, make_plan
from meditron_train.corpus.pipeline.work import WorkDirectory
from meditron_train.errors import UserError
from meditron_train.files import sha256_file
from tests.corpus.pipeline.corpora import article, corpus, nearly, source, write_jsonl
from tests.corpus.reading import FIXTURES
from tests.long import mostly_long

GERMAN = (
    "Die Patienten wurden nach der Operation in den Aufwachraum gebracht und dort über Nacht beobachtet. " * 3
)


def documents(output: Path) -> dict[str, dict[str, Any]]:
    """Every document of a finished corpus, by id."""
    found = {}
    for path in sorted((output / "documents").glob("*.zst")):
        found |= {record["id"]: record for record in read_json_lines(path)}
    return found


def dropped(output: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in read_json_lines(output / "dropped.jsonl.zst")}


def question(text: str, first: int, last: int) -> str:
    return " ".join(text.split()[first:last])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, Any]]:
    """Guidelines, abstracts and papers with what is to be found, built once."""
    root = tmp_path_factory.mktemp("planted")
    guidelines = [{"id": f"g{i}", "text": article(i)} for i in range(8)]
    guidelines.append({"id": "german", "text": GERMAN})
    guidelines.append({"id": "short", "text": "Too short."})
    guidelines.append({"id": "repeated", "text": "The dose of the drug is the dose of the day. " * 30})
    papers = [
        {"id": f"p{i}", "text": article(100 + i), "pmid": str(i), "doi": f"10.1/{i}"} for i in range(20)
    ]
    papers.append({"id": "exact", "text": article(0).replace(" the ", "  THE ").replace(".", "!")})
    papers.append({"id": "near", "text": nearly(article(1, 40), 5)})
    guidelines.append({"id": "long", "text": article(1, 40)})
    papers.append({"id": "near2", "text": nearly(article(2, 40), 5)})
    papers.append({"id": "near3", "text": nearly(article(2, 40), 6)})
    papers.append({"id": "asks", "text": article(300) + " Note: " + question(article(400), 2, 20)})
    papers.append({"id": "asks8", "text": article(301) + " Also: " + question(article(401), 3, 13)})
    papers.append({"id": "asks7", "text": article(302) + " Also: " + question(article(402), 3, 10)})
    abstracts = [{"id": f"a{i}", "text": article(200 + i, 4), "pmid": str(2 * i)} for i in range(20)]
    abstracts.append({"id": "doi", "text": article(250, 4), "doi": "https://doi.org/10.1/3"})
    quiz = [
        {"id": "q400", "question": question(article(400), 0, 30)},  # 18 of its words are shared
        {"id": "q401", "question": question(article(401), 0, 16)},  # 10 of 16: aligned, but not 13 in a row
        {"id": "q402", "question": question(article(402), 0, 16)},  # 7 in a row: neither
        {"id": "clean", "question": question(article(403), 0, 30)},
        {"id": "tiny", "question": "what is it"},
    ]
    write_jsonl(root / "quiz.jsonl", quiz)
    declared = corpus(
        root / "out",
        [
            source("guidelines", write_jsonl(root / "g.jsonl", guidelines), "guidelines", validation=0.25),
            source("abstracts", write_jsonl(root / "a.jsonl", abstracts), "abstracts"),
            source("papers", write_jsonl(root / "p" / "0.jsonl", papers).parent),
            source("absent", None, "guidelines", released=False, articles=47),
        ],
        decontamination={"benchmarks": [{"name": "quiz", "path": str(root / "quiz.jsonl")}]},
    )
    return declared, build(declared, Execution(workers=1))


def test_what_is_planted_is_found_and_nothing_else(planted: tuple[Corpus, dict[str, Any]]) -> None:
    declared, _ = planted
    gone = {doc_id: record["rule"] for doc_id, record in dropped(declared.output).items()}
    abstracts_of_papers = {f"a{i}": "duplicate.full_text" for i in range(10)}
    assert gone == {
        "german": "language.de",
        "short": "length.short",
        "repeated": gone["repeated"],
        "exact": "duplicate.exact_duplicate",
        "near": "duplicate.near_duplicate",
        "near3": "duplicate.near_duplicate",
        "asks": "contaminated",
        "asks8": "contaminated",
        "doi": "duplicate.full_text",
        **abstracts_of_papers,
    }
    assert gone["repeated"].startswith("repetition.")
    kept = documents(declared.output)
    expected = {f"g{i}" for i in range(8)} | {f"p{i}" for i in range(20)} | {f"a{i}" for i in range(10, 20)}
    assert set(kept) == expected | {"long", "near2", "asks7"}
    assert kept["p3"]["text"] == article(103)


def test_the_earliest_source_keeps_its_document(planted: tuple[Corpus, dict[str, Any]]) -> None:
    gone = dropped(planted[0].output)
    assert (gone["exact"]["kept"], gone["exact"]["kept_source"]) == ("g0", "guidelines")
    assert (gone["near"]["kept"], gone["near"]["kept_source"]) == ("long", "guidelines")
    assert gone["near3"]["kept"] == "near2"
    assert gone["a4"]["kept"] == "p8"
    assert gone["doi"]["kept"] == "p3"


def test_dropped_documents_have_their_identifiers(planted: tuple[Corpus, dict[str, Any]]) -> None:
    gone = dropped(planted[0].output)
    assert (gone["a4"]["pmid"], gone["doi"]["doi"]) == ("8", "10.1/3")
    assert "pmid" not in gone["near"]


def test_every_hit_is_reported(planted: tuple[Corpus, dict[str, Any]]) -> None:
    declared, manifest = planted
    hits = list(read_json_lines(declared.output / "contamination.jsonl"))
    assert [(hit["id"], hit["item"], hit["rule"]) for hit in hits] == [
        ("asks", "q400", "aligned"),
        ("asks", "q400", "ngram"),
        ("asks8", "q401", "aligned"),
    ]
    shared = question(article(401), 3, 13).lower().replace(".", "")
    assert hits[2]["shared"] == [shared]
    assert hits[2]["share"] == pytest.approx(10 / 16)
    (benchmark,) = manifest["benchmarks"]
    assert (benchmark["items"], benchmark["too_short"], benchmark["touched"]) == (5, 1, 2)
    assert benchmark["touched_by_rule"] == {"ngram": 1, "aligned": 2}


def test_the_manifest_adds_up(planted: tuple[Corpus, dict[str, Any]]) -> None:
    declared, manifest = planted
    for record in manifest["sources"]:
        kept = sum(counts["documents"] for counts in record["splits"].values())
        assert record["read"]["documents"] == kept + sum(record["dropped"].values()), record["name"]
        assert record["read"]["records"] == record["read"]["documents"] + sum(record["left_out"].values())
    finished = FinishedCorpus.open(declared.output)
    for dataset in finished.datasets:
        rows = [row for batch in dataset.rows() for row in batch.to_pylist()]
        texts = list(read_json_lines(dataset.documents))
        assert [row["id"] for row in rows] == [record["id"] for record in texts]
        assert all(row["num_chars"] == len(text["text"]) for row, text in zip(rows, texts, strict=True))
    assert {dataset.stem for dataset in finished.datasets} >= {"guidelines.train", "guidelines.validation"}
    assert manifest["sources"][3]["is_given"] is False
    for name, recorded in manifest["files"].items():
        assert sha256_file(declared.output / name) == recorded
    assert not (declared.output / ".build").exists()


@pytest.mark.parametrize(("workers", "tasks"), [(1, 7), pytest.param(4, 3, marks=pytest.mark.long)])
def test_workers_and_tasks_change_nothing(
    planted: tuple[Corpus, dict[str, Any]], tmp_path: Path, workers: int, tasks: int | None
) -> None:
    declared, manifest = planted
    again = build(
        declared.model_copy(update={"output": tmp_path / "out"}), Execution(workers=workers, tasks=tasks)
    )
    assert again == manifest


def test_flagged_documents_stay(tmp_path: Path) -> None:
    texts = [{"id": f"d{i}", "text": article(i)} for i in range(3)]
    quiz = write_jsonl(
        tmp_path / "quiz.jsonl", [{"stem": question(article(1), 0, 30), "options": {"A": "yes"}}]
    )
    declared = corpus(
        tmp_path / "out",
        [source("texts", write_jsonl(tmp_path / "t.jsonl", texts))],
        decontamination={
            "benchmarks": [{"name": "quiz", "path": str(quiz), "keys": ["stem", "options"]}],
            "action": "flag",
        },
    )
    manifest = build(declared)
    assert manifest["benchmarks"][0]["touched"] == 1
    assert set(documents(declared.output)) == {"d0", "d1", "d2"}
    (dataset,) = FinishedCorpus.open(declared.output).datasets
    flags = {row["id"]: row["contaminated"] for batch in dataset.rows() for row in batch.to_pylist()}
    assert flags == {"d0": False, "d1": True, "d2": False}


@pytest.fixture
def bad(tmp_path: Path) -> Corpus:
    lines = [
        json.dumps({"id": "good", "text": article(1)}),
        "{not json",
        json.dumps({"id": "twice", "text": article(2)}),
        json.dumps({"id": "twice", "text": article(3)}),
        json.dumps({"id": "odd", "text": article(4), "license": "My-Own-Terms"}),
        json.dumps({"id": "empty", "text": "  "}),
        json.dumps({"id": "surrogate", "text": article(5) + " \ud800"}),
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return corpus(
        tmp_path / "out",
        [source("bad", tmp_path / "bad.jsonl"), source("missing", tmp_path / "nowhere")],
    )


def test_bad_input_is_reported_with_its_place(bad: Corpus) -> None:
    manifest = build(bad)
    problems = [
        (record["source"], record["reason"], record["file"], record["position"])
        for record in read_json_lines(bad.output / "problems.jsonl")
    ]
    file = str(bad.sources[0].path)
    assert ("missing", "missing", str(bad.sources[1].path), "") in problems
    assert {(reason, name) for name, reason, *_ in problems} >= {
        ("broken_json", "bad"),
        ("duplicate_id", "bad"),
        ("unknown_license", "bad"),
        ("empty", "bad"),
        ("missing", "missing"),
    }
    assert all(where and place == file for name, _, place, where in problems if name == "bad")
    counted = sum(sum(record["problems"].values()) for record in manifest["sources"])
    assert counted == len(problems)
    kept = documents(bad.output)
    assert {"good", "twice", "odd"} <= set(kept)
    assert "surrogate" not in kept


def test_strict_stops_at_the_first_problem(bad: Corpus) -> None:
    with pytest.raises(UserError, match="nowhere: missing"):
        build(bad, strict=True)
    alone = bad.model_copy(update={"sources": bad.sources[:1]})
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: broken_json"):
        build(alone, strict=True)


@pytest.mark.long
def test_strict_stops_at_what_another_build_went_past(
    bad: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = bad.model_copy(update={"sources": bad.sources[:1]})
    manifest = build(alone)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: broken_json"):
        build(alone, strict=True)
    assert build(alone) == manifest
    # The same where it was interrupted behind the stage that reads.
    again = alone.model_copy(update={"output": tmp_path / "again"})
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("meditron_train.corpus.pipeline.build.drop_equal_content", _interrupt)
        build(again)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: broken_json"):
        build(again, strict=True)
    assert build(again)["files"].keys() == manifest["files"].keys()


def _interrupt(*_: object) -> None:
    raise InterruptedError


def test_strict_does_not_stop_at_what_a_rule_leaves_out(tmp_path: Path) -> None:
    records = [{"id": "d", "text": article(1)}, {"id": "d", "text": article(2)}, {"id": "e", "text": " "}]
    declared = corpus(tmp_path / "out", [source("texts", write_jsonl(tmp_path / "t.jsonl", records))])
    problems = build(declared, strict=True)["sources"][0]["problems"]
    assert problems == {"duplicate_id": 1, "empty": 1}


@pytest.mark.parametrize("reader", mostly_long(["jsonl", "guidelines"], "jsonl"))
def test_an_empty_record_takes_no_id(tmp_path: Path, reader: str) -> None:
    key = {"jsonl": "text", "guidelines": "clean_text"}[reader]
    records = [{"id": "d", key: article(1)}, {"id": "d", key: " "}]
    options = {"id_key": "id"} if reader == "jsonl" else {}
    texts = write_jsonl(tmp_path / f"{reader}.jsonl", records)
    declared = corpus(tmp_path / "out", [source("texts", texts, reader=reader, options=options)])
    assert build(declared)["sources"][0]["problems"] == {"empty": 1}
    assert set(documents(declared.output)) == {"d"}


def test_records_that_no_source_selects_are_counted_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"id": str(i), "text": article(i), "url": "ab"[i % 2]} for i in range(6)]
    texts = write_jsonl(tmp_path / "t.jsonl", records)
    declared = corpus(tmp_path / "out", [source("texts", texts, select={"url": "a"})])
    (counts,) = build(declared)["sources"]
    assert (counts["read"]["documents"], counts["not_selected"]) == (3, {"url: b": 3})
    assert "records of the files of 'texts' that no source selects: 3, which have url: b (3)" in caplog.text


def test_a_file_of_several_sources_is_read_once(tmp_path: Path) -> None:
    records = [{"id": str(i), "text": article(i), "url": "abc"[i % 3]} for i in range(9)]
    records.append({"id": "8", "text": article(20), "url": "b"})  # takes the id of another source's record
    texts = write_jsonl(tmp_path / "t.jsonl", records)
    with texts.open("a") as file:
        file.write("{not json\n")
    sources = [source(name, texts, select={"url": name}) for name in ("b", "a")]
    first, second = build(corpus(tmp_path / "out", sources))["sources"]
    assert first["problems"] == {"broken_json": 1, "duplicate_id": 1} and second["problems"] == {}
    assert first["read"]["records"] == 4 + 2 + 2  # its own, c's that nobody selects, the two problems
    assert (first["not_selected"], second["not_selected"]) == ({"url: c": 2}, {})
    assert (second["read"]["records"], second["read"]["documents"]) == (3, 3)
    assert set(documents(tmp_path / "out")) == {"0", "1", "3", "4", "6", "7", "8"}
    (problem,) = (p for p in read_json_lines(tmp_path / "out" / "problems.jsonl") if p["id"])
    assert (problem["id"], problem["position"], problem["is_record"]) == ("8", "line 9", True)


@pytest.mark.long
def test_an_abstract_stays_where_its_paper_is_contaminated(tmp_path: Path) -> None:
    asked = question(article(7), 0, 30)
    quiz = write_jsonl(tmp_path / "quiz.jsonl", [{"question": asked}])
    papers = [
        {"id": "p", "text": article(1) + asked, "pmid": "5"},
        {"id": "q", "text": article(2), "pmid": "6"},
    ]
    abstracts = [{"id": f"a{pmid}", "text": article(pmid), "pmid": str(pmid)} for pmid in (5, 6)]
    sources = [
        source("papers", write_jsonl(tmp_path / "p.jsonl", papers)),
        source("abstracts", write_jsonl(tmp_path / "a.jsonl", abstracts), "abstracts"),
    ]
    wanted = {"benchmarks": [{"name": "quiz", "path": str(quiz)}]}
    build(corpus(tmp_path / "out", sources, decontamination=wanted))
    gone = {doc_id: record["rule"] for doc_id, record in dropped(tmp_path / "out").items()}
    assert gone == {"p": "contaminated", "a6": "duplicate.full_text"}


@pytest.mark.long
def test_a_paper_that_is_its_abstract_alone_stays_in_its_place(tmp_path: Path) -> None:
    """The abstract comes first, has the same text and the same PMID; a guideline has that of another pair."""
    papers = [{"id": f"p{i}", "text": article(i), "pmid": str(i)} for i in (5, 6)]
    abstracts = [{"id": f"a{i}", "text": article(i), "pmid": str(i)} for i in (5, 6)]
    sources = [
        source(
            "guidelines", write_jsonl(tmp_path / "g.jsonl", [{"id": "g", "text": article(6)}]), "guidelines"
        ),
        source("abstracts", write_jsonl(tmp_path / "a.jsonl", abstracts), "abstracts"),
        source("papers", write_jsonl(tmp_path / "p.jsonl", papers)),
    ]
    build(corpus(tmp_path / "out", sources))
    assert documents(tmp_path / "out").keys() == {"g", "p5"}
    gone = {doc_id: (record["rule"], record["kept"]) for doc_id, record in dropped(tmp_path / "out").items()}
    assert gone == {
        "a5": ("duplicate.full_text", "p5"),
        "a6": ("duplicate.full_text", "g"),
        "p6": ("duplicate.exact_duplicate", "g"),
    }


@pytest.mark.long
def test_an_unknown_license_is_not_blamed_on_another_file(tmp_path: Path) -> None:
    pages = shutil.copytree(FIXTURES / "pages", tmp_path / "pages")
    (pages / "fever.json").write_text('{"license": "odd"}')
    declared = corpus(tmp_path / "out", [source("pages", pages, reader="pages", options={})])
    build(declared)
    (problem,) = read_json_lines(declared.output / "problems.jsonl")
    assert (problem["file"], problem["position"]) == (str(pages), "document fever.html")


def test_unknown_licenses_may_be_dropped(bad: Corpus) -> None:
    licenses = bad.licenses.model_copy(update={"unknown": "drop"})
    build(bad.model_copy(update={"licenses": licenses}))
    assert "odd" not in documents(bad.output)
    assert dropped(bad.output)["odd"]["rule"] == "invalid.unknown_license"


@pytest.mark.long
def test_a_huge_document_is_dropped_by_rule_or_kept_in_bounded_memory(tmp_path: Path) -> None:
    huge = (article(1, 200) + " ") * 180
    assert len(huge) > 2_000_000, "the longest that is kept"
    write_jsonl(tmp_path / "t.jsonl", [{"id": "huge", "text": huge}, {"id": "usual", "text": article(2)}])
    declared = corpus(tmp_path / "out", [source("texts", tmp_path / "t.jsonl")])
    build(declared)
    assert dropped(declared.output)["huge"]["rule"] == "length.long"
    off = {name: {"enabled": False} for name in ("length", "language", "repetition", "quality")}
    declared = corpus(tmp_path / "all", [source("texts", tmp_path / "t.jsonl")], filters=off)
    build(declared)
    assert set(documents(declared.output)) == {"huge", "usual"}


def test_a_finished_build_is_left_alone_and_another_refused(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", [{"id": "d", "text": article(1)}])
    declared = corpus(tmp_path / "out", [source("texts", texts)])
    manifest = build(declared)
    stamp = (declared.output / "documents" / "texts.train.jsonl.zst").stat().st_mtime_ns
    assert build(declared) == manifest
    assert (declared.output / "documents" / "texts.train.jsonl.zst").stat().st_mtime_ns == stamp
    other = corpus(tmp_path / "out", [source("other", texts)])
    with pytest.raises(UserError, match="--overwrite"):
        build(other)
    for name in ("data.yaml", "phases.yaml", "card/card.md"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("of the corpus that was here before")
    build(other, overwrite=True)
    assert not {"data.yaml", "phases.yaml", "card"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert sorted(path.name for path in (tmp_path / "out" / "documents").iterdir()) == [
        "other.train.jsonl.zst"
    ]


def test_an_empty_corpus_is_a_corpus(tmp_path: Path) -> None:
    declared = corpus(tmp_path / "out", [source("absent", None)])
    assert build(declared)["sources"][0]["splits"]["train"]["documents"] == 0


def test_readers_and_benchmarks_that_are_not_there(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", [{"id": "d", "text": article(1)}])
    with pytest.raises(UserError, match="no reader 'jsonn'; use one of .*jsonl"):
        build(corpus(tmp_path / "out", [source("texts", texts, reader="jsonn")]))
    wanted = {"benchmarks": [{"name": "quiz", "path": str(tmp_path / "no.jsonl")}]}
    with pytest.raises(UserError, match=r"'quiz': there is no file .*no\.jsonl"):
        build(corpus(tmp_path / "out", [source("texts", texts)], decontamination=wanted))
    quiz = write_jsonl(tmp_path / "quiz.jsonl", [{"stem": "x"}])
    wanted = {"benchmarks": [{"name": "quiz", "path": str(quiz)}]}
    with pytest.raises(UserError, match="line 1 has no 'question'; it has 'stem'"):
        build(corpus(tmp_path / "out", [source("texts", texts)], decontamination=wanted))


def test_every_input_counts_for_whether_a_build_is_the_same(tmp_path: Path) -> None:
    """Benchmarks, files in the folders of articles, and files that lie beside those of a source."""
    pmc = shutil.copytree(FIXTURES / "pmc", tmp_path / "pmc")
    pages = shutil.copytree(FIXTURES / "pages", tmp_path / "pages")
    medline = shutil.copytree(FIXTURES / "medline", tmp_path / "medline")
    quiz = write_jsonl(tmp_path / "quiz.jsonl", [{"question": "what was never asked before in any quiz"}])
    sources = [
        source("pmc", pmc, reader="pmc", options={}),
        source("pages", pages, "guidelines", reader="pages", options={}),
        source("medline", medline, "abstracts", reader="medline", options={"check_md5": False}),
    ]
    wanted = {"benchmarks": [{"name": "quiz", "path": str(quiz)}]}
    declared = corpus(tmp_path / "out", sources, decontamination=wanted)

    def plan() -> Plan:
        return make_plan(declared, WorkDirectory(tmp_path / "work"))

    assert plan().benchmarks == {"quiz": sha256_file(quiz)}
    known = {plan().fingerprint}
    assert known == {plan().fingerprint}
    for path in (
        quiz,
        pmc / "PMC900001.2" / "PMC900001.2.xml",
        pmc / "metadata" / "PMC900004.1.json",
        pages / "fever.json",
        medline / "baseline" / "pubmed26n0001.xml.md5",
    ):
        with open(path, "ab") as file:
            file.write(b"\n")
        assert plan().fingerprint not in known, path
        known.add(plan().fingerprint)


@pytest.mark.long
def test_an_empty_folder_and_a_link_to_nothing_are_problems_of_their_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    medline = shutil.copytree(FIXTURES / "medline", tmp_path / "medline")
    (medline / "updatefiles" / "pubmed26n1336.xml").symlink_to(tmp_path / "gone.xml")
    texts = write_jsonl(tmp_path / "t.jsonl", [{"id": "d", "text": article(1)}])
    declared = corpus(
        tmp_path / "out",
        [
            source("empty", tmp_path / "empty"),
            source("medline", medline, "abstracts", reader="medline", options={}),
            source("texts", texts),
        ],
    )
    counts = {counted["name"]: counted["problems"].get("missing") for counted in build(declared)["sources"]}
    assert counts == {"empty": 1, "medline": 1, "texts": None}
    assert "d" in documents(declared.output)
