"""Web pages and PDF files against texts written by hand."""

from __future__ import annotations

import json
import shutil

import pytest

from meditron_train.corpus.readers import pages
from meditron_train.errors import UserError
from tests.corpus.pdf_file import pdf_file
from tests.corpus.reading import FIXTURES, expected, read_source, said

PAGES = FIXTURES / "pages"


def test_texts_and_metadata():
    documents, problems = read_source(pages, PAGES, source="ihb")
    assert problems == []
    assert [document.id for document in documents] == ["cough.pdf", "fever.html"]
    for document in documents:
        assert document.text == expected(f"{document.id}.txt")
    assert documents[0].metadata == {
        "kind": "guideline",
        "source": "ihb",
        "title": "Cough in children",
        "num_pages": 3,
    }
    assert documents[1].metadata == {
        "kind": "guideline",
        "source": "ihb",
        "title": "Fever in adults",
        "url": "https://example.org/guidelines/fever",
        "date": "2024-05-06",
    }


def test_rules_and_a_description_beside_the_file(tmp_path):
    (tmp_path / "who").mkdir()
    shutil.copy(PAGES / "fever.html", tmp_path / "who")
    (tmp_path / "who" / "fever.json").write_text(
        json.dumps({"license": "CC-BY-4.0", "date": "2025", "note": "x"})
    )
    (document,), _ = read_source(pages, tmp_path, text={"tables": "drop", "drop_boilerplate": False})
    assert document.id == "who/fever.html"
    assert document.metadata["license"] == "CC-BY-4.0"
    assert document.metadata["date"] == "2025"
    assert "note" not in document.metadata
    assert "Age" not in document.text
    assert "## References\nQuist B. On fever." in document.text


def test_shards():
    shards = pages.shards({"path": str(PAGES), "files_per_shard": 1})
    assert [(shard.name, shard.paths[0].name) for shard in shards] == [
        ("00000000", "cough.pdf"),
        ("00000001", "fever.html"),
    ]


def test_bad_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"there is no file \*.html"):
        pages.shards({"path": str(tmp_path)})
    good = (PAGES / "cough.pdf").read_bytes()
    (tmp_path / "a.pdf").write_bytes(good[:300])
    (tmp_path / "b.pdf").write_bytes(b"")
    (tmp_path / "c.pdf").write_bytes(pdf_file([[], []]))
    (tmp_path / "d.pdf").write_bytes(pdf_file([["word " * 50] * 50] * 3))
    (tmp_path / "e.html").write_bytes("<html><body><p>café</p></body></html>".encode("latin-1"))
    (tmp_path / "f.html").write_bytes(b"")
    (tmp_path / "g.html").write_bytes(b"<html>" + b"<p>word</p>" * 10_000 + b"</html>")
    (tmp_path / "h.html").write_bytes((PAGES / "fever.html").read_bytes())
    (tmp_path / "h.json").write_text("{")
    documents, problems = read_source(pages, tmp_path, max_record_bytes=20_000)
    assert documents == []
    assert said(problems) == [
        "a.pdf |  | broken_file",
        "b.pdf |  | broken_file",
        "c.pdf |  | ocr_only",
        "d.pdf |  | too_large",
        "e.html |  | invalid_utf8",
        "f.html |  | empty",
        "g.html |  | too_large",
        "h.json | line 1 | broken_json",
    ]


PARAGRAPH = [
    "These recommendations hold for all clinics of the board, and were agreed on in",
    "a meeting of the committee. The members have read what there is, as a list at",
    "the end says, and found it to be of use.",
]


def pdf_text(tmp_path, lines: list[str]) -> list[str]:
    """The lines of the text of a PDF file with these lines."""
    (tmp_path / "a.pdf").write_bytes(pdf_file([lines]))
    (document,), _ = read_source(pages, tmp_path)
    return document.text.split("\n")


def test_front_matter_does_not_end_a_pdf(tmp_path):
    contents = ["Contents", "Acknowledgements", "1. Introduction", "References", ""]
    thanks = ["We thank the board, which has given us its room and its patience, and also", "all who came."]
    front = ["Acknowledgements", *thanks, ""]
    front += ["Disclaimer", "The board is not liable.", "", "Executive summary", *PARAGRAPH, ""]
    body = ["Funding", "None.", "", "1. Introduction", *PARAGRAPH, "", "References", "1. Quist B. On fever."]
    paragraph = " ".join(PARAGRAPH)
    assert pdf_text(tmp_path, contents + front + body + ["", "Annex", *PARAGRAPH]) == [
        "Contents",
        *("1. Introduction", "Executive summary", paragraph),
        *("1. Introduction", paragraph),
    ]


def test_the_references_of_a_chapter_do_not_end_a_pdf(tmp_path):
    chapter = ["Treatment", *PARAGRAPH, "", "References", "1. quist b. on fever. old j 1901;", ""]
    paragraph = " ".join(PARAGRAPH)
    assert pdf_text(tmp_path, chapter * 3) == ["Treatment", paragraph] * 3


def test_signs_at_the_beginning_of_a_line_of_a_pdf(tmp_path):
    lines = ["Store the vials at a temperature that is not below", "-20 degrees, or *at once* use them.", ""]
    assert pdf_text(tmp_path, [*lines, "* Shake it.", "- Give it."]) == [
        "Store the vials at a temperature that is not below -20 degrees, or *at once* use them.",
        "- Shake it.",
        "- Give it.",
    ]


@pytest.mark.parametrize("name", ["undefined", "hex", "no-such-encoding"])
def test_an_encoding_that_is_none_of_pages_counts_for_nothing(tmp_path, name):
    text = "The patient’s temperature is measured twice a day, and written down by a nurse."
    page = f'<html><head><meta charset="{name}"></head><body><p>{text}</p></body></html>'
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    (document,), problems = read_source(pages, tmp_path)
    assert (document.text, problems) == (text, [])


@pytest.mark.parametrize("name", ["ISO-8859-1", "latin1", "us-ascii", "windows-1252"])
def test_latin_1_is_read_as_browsers_do(tmp_path, name):
    text = "The patient’s temperature – in °C – is measured twice a day, and written “down”."
    page = f'<html><head><meta charset="{name}"></head><body><p>{text}</p></body></html>'
    (tmp_path / "a.html").write_bytes(page.encode("cp1252").replace(b"twice", b"t\x81wice"))
    (document,), problems = read_source(pages, tmp_path)
    assert problems == []
    assert document.text == text
