"""S2ORC papers against texts written by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from meditron_train.corpus.licenses import S2ORC_KNOWN, s2orc_license
from meditron_train.corpus.readers import s2orc
from tests.corpus.reading import read_source, said

Part = tuple[str, str, dict[str, Any]]
PARTS: tuple[Part, ...] = (
    ("title", "A STUDY OF FEVER", {}),
    ("", "\n", {}),
    ("author", "A. Tarn", {}),
    ("", "\nHall of Healing, Journal of Nothing 12\n", {}),
    ("abstract", "Fever is common.", {}),
    ("", "\n\n", {}),
    ("sectionheader", "Introduction", {"n": "1."}),
    ("", "\nEarly work (", {}),
    ("bibref", "Quist 1901", {"ref_id": "b0"}),
    ("", ") was lost, see ", {}),
    ("figureref", "Fig. 1", {"ref_id": "fig_0"}),
    ("", " and ", {}),
    ("tableref", "Table 2", {"ref_id": "tab_0"}),
    ("", ". An unknown source ", {}),
    ("bibref", "[9]", {}),
    ("", " says [fig] so.\n\nWe set\n", {}),
    ("formula", "y = a x", {}),
    ("", "\n", {}),
    ("sectionheader", "Patients", {"n": "2.1"}),
    ("", "\n12 adults 😀 \x0e came.\n", {}),
    ("sectionheader", "Acknowledgements", {}),
    ("", "\nWe thank ", {}),
    ("bibref", "b", {"ref_id": "b0"}),
    ("", " nobody.\n", {}),
    ("sectionheader", "Appendix", {}),
    ("", "\nIt ends.\n", {}),
    ("figure", "Fig. 1. Course of the fever. Bars are means.", {"id": "fig_0"}),
    ("", "\n", {}),
    ("figure", "Table 2: Doses.", {"id": "tab_0"}),
    ("", "\n", {}),
    ("bibentry", "1. B. Quist. On fever. Old J 1901.", {"id": "b0"}),
    ("", "\n", {}),
)
TEXT = """A study of fever

# Abstract
Fever is common.

# Introduction
Early work [bib_ref] On fever, Quist [/bib_ref] was lost, see [fig_ref] Figure 1: Course of the fever [/fig_ref] \
and [fig_ref] Table 2: Doses [/fig_ref]. An unknown source says (fig) so.

We set
[formula] y = a x [/formula]

## Patients
12 adults 😀 came.

# Appendix
It ends.
[fig] Figure 1: Course of the fever. Bars are means. [/fig]
[table] Table 2: Doses. [/table]"""


def paper(number: object = 7, parts: Iterable[Part] = PARTS, **changes: Any) -> dict[str, Any]:
    """A record whose annotations are made from the parts."""
    text, annotations = "", {}
    for kind, part, attributes in parts:
        if kind:
            span: dict[str, Any] = {"start": str(len(text)) if kind == "author" else len(text)}
            span["end"] = len(text) + len(part)
            if attributes:
                span["attributes"] = attributes
            annotations.setdefault(kind, []).append(span)
        text += part
    entry = annotations["bibentry"][0]["start"]
    for kind, part in (("bibtitle", "On fever"), ("bibauthorlastname", "Quist")):
        start = text.index(part, entry)
        annotations[kind] = [{"start": start, "end": start + len(part)}]
    stored = {kind: json.dumps(spans) for kind, spans in annotations.items()}
    content = {
        "source": {"oainfo": {"license": "CCBY"}},
        "text": text,
        "annotations": {**stored, "venue": None},
    }
    record = {
        "corpusid": number,
        "externalids": {"pubmedcentral": "900001", "pubmed": "80000001", "doi": "10.5555/AIM", "mag": None},
        "title": "A study of fever",
        "content": content,
    }
    return {**record, **changes}


def write(path: Path, *records: dict[str, Any]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


def test_text_and_metadata(tmp_path):
    write(tmp_path / "0001.gz", paper())
    (document,), problems = read_source(s2orc, tmp_path)
    assert problems == []
    assert document.text == TEXT
    assert document.id == "S2:7"
    assert document.metadata == {
        "kind": "article",
        "title": "A study of fever",
        "url": "https://api.semanticscholar.org/CorpusID:7",
        "doi": "10.5555/aim",
        "pmid": "80000001",
        "pmcid": "PMC900001",
        "license": "LicenseRef-S2ORC-CC-BY",
        "license_code": "CCBY",
        "full_text": True,
    }


def test_figures_behind_the_acknowledgments_are_kept(tmp_path):
    parts = [part for part in PARTS if part[1] not in ("Appendix", "\nIt ends.\n")]
    write(tmp_path / "0001.gz", paper(parts=parts))
    (document,), _ = read_source(s2orc, tmp_path)
    assert document.text == TEXT.replace("\n\n# Appendix\nIt ends.", "")


def test_rules(tmp_path):
    write(tmp_path / "0001.gz", paper(title=None))
    rules = {
        "citations": "drop",
        "figure_refs": "label",
        "formulas": False,
        "figures": False,
        "tables": "drop",
    }
    (document,), _ = read_source(s2orc, tmp_path, text=rules)
    assert document.text == (
        "A STUDY OF FEVER\n\n# Abstract\nFever is common.\n\n"
        "# Introduction\nEarly work was lost, see [fig_ref] Figure 1 [/fig_ref] and [fig_ref] Table 2 [/fig_ref]. "
        "An unknown source says (fig) so.\n\nWe set\n\n## Patients\n12 adults 😀 came.\n\n# Appendix\nIt ends."
    )


def test_a_later_record_of_the_same_paper_is_kept(tmp_path):
    write(tmp_path / "0001.gz", paper(7), paper(8))
    write(tmp_path / "0002.gz", paper(7, content={"text": "Other text."}))
    documents, problems = read_source(s2orc, tmp_path)
    assert [document.id for document in documents] == ["S2:8", "S2:7"]
    assert documents[1].text == "A study of fever\n\nOther text."
    assert said(problems) == ["0001.gz | line 1 | duplicate_id"]
    assert problems[0].detail == "S2:7: the same id as record 0 of 0002.gz with different text, which is kept"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (paper("x"), "broken_file"),
        (paper(content=None), "empty"),
        (paper(content={"text": None}), "empty"),
        (paper(content={"text": "abc", "annotations": "none"}), "broken_file"),
        (paper(content={"text": "abc", "annotations": {"figure": "[{"}}), "broken_file"),
        (
            paper(
                content={
                    "text": "abc",
                    "annotations": {"figure": '[{"start": 0, "end": 1, "attributes": 3}]'},
                }
            ),
            "broken_file",
        ),
        (
            paper(content={"text": "abc", "annotations": {"figure": '[{"start": 1, "end": 9}]'}}),
            "broken_file",
        ),
        (paper(content={"text": "abc", "annotations": {"figure": '[{"start": 1}]'}}), "broken_file"),
        (
            paper(content={"text": "abc", "annotations": {"bibref": '[{"start": -3, "end": -1}]'}}),
            "broken_file",
        ),
    ],
)
def test_bad_records_are_reported(tmp_path, record, reason):
    write(tmp_path / "0001.gz", record, paper(9))
    documents, problems = read_source(s2orc, tmp_path)
    assert [document.id for document in documents] == ["S2:9"]
    assert said(problems) == [f"0001.gz | line 1 | {reason}"]


@pytest.mark.parametrize(
    ("code", "license"),
    [
        ("CCBYNCND", "LicenseRef-S2ORC-CC-BY-NC-ND"),
        ("cc-by-nc", "LicenseRef-S2ORC-CC-BY-NC"),
        ("CC0", "LicenseRef-S2ORC-CC0"),
        ("publisher-specific, author manuscript", "LicenseRef-S2ORC-publisher-specific-author-manuscript"),
    ],
)
def test_the_license_is_the_papers_own(code: str, license: str) -> None:
    assert s2orc_license(code) == license
    assert (license in S2ORC_KNOWN) == ("publisher" not in code)
