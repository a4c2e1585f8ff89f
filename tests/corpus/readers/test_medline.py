"""MEDLINE citations against texts written by hand, and files that are damaged in every way."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import zlib

import pytest

from meditron_train.corpus.document import Reason
from meditron_train.corpus.readers import medline
from meditron_train.errors import UserError
from tests.corpus.reading import FIXTURES, expected, read_source, said

MEDLINE = FIXTURES / "medline"


def article(pmid: int, abstract: str = "Some text.") -> str:
    return (
        f"<PubmedArticle><MedlineCitation><PMID Version='1'>{pmid}</PMID><Article><ArticleTitle>T</ArticleTitle>"
        f"<Abstract><AbstractText>{abstract}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>\n"
    )


def article_set(*records: str, doctype: str = "") -> bytes:
    return f"<?xml version='1.0'?>{doctype}<PubmedArticleSet>\n{''.join(records)}</PubmedArticleSet>".encode()


@pytest.mark.parametrize("backwards", [False, True])
def test_texts(backwards):
    documents, problems = read_source(medline, MEDLINE, backwards)
    texts = [f"{document.id}\n{document.text}" for document in documents]
    assert "\n----\n".join(texts) == expected("medline.txt")
    assert said(problems) == [
        "pubmed26n0001.xml | record 1 (line 24) | superseded",
        "pubmed26n0001.xml | record 2 (line 35) | deleted",
        "pubmed26n0001.xml | record 3 (line 46) | superseded",
        "pubmed26n0001.xml | record 5 (line 68) | retracted",
        "pubmed26n0001.xml | record 6 (line 81) | empty",
    ]
    assert problems[0].detail == "PMID:70000002: replaced by record 0 of pubmed26n1335.xml"
    assert problems[1].detail == "PMID:70000003: deleted by record 3 of pubmed26n1335.xml"


def test_metadata():
    documents, _ = read_source(medline, MEDLINE, keep_retracted=True, require_abstract=False)
    found = {document.id: document.metadata for document in documents}
    assert found["PMID:70000001"] == {
        "kind": "abstract",
        "title": "Zelapril lowers the fever.",
        "pmid": "70000001",
        "pmcid": "PMC900001",
        "doi": "10.5555/aim.1",
        "version": 1,
        "url": "https://pubmed.ncbi.nlm.nih.gov/70000001/",
        "language": "en",
        "journal": "Annals of Invented Medicine",
        "date": "2001-02-03",
        "publication_types": ["Journal Article"],
    }
    assert found["PMID:70000002"]["corrections"] == [{"type": "ErratumIn", "by": "Old J. 1999;3:4"}]
    assert found["PMID:70000002"]["date"] == "1998"
    assert found["PMID:70000004"]["version"] == 2
    assert found["PMID:70000005"]["retracted"] is True
    assert found["PMID:70000005"]["corrections"] == [{"type": "RetractionIn", "by": "70000099"}]
    assert found["PMID:70000006"]["title"] == "[A title without an abstract]."
    book = found["PMID:70000007"]
    assert (book["kind"], book["book"], book["date"]) == ("book", "The Invented Handbook", "2021-07-08")
    assert book["bookaccession"] == "NBK900007"
    assert found["PMID:70000008"]["language"] == "de"


def test_other_languages():
    documents, _ = read_source(medline, MEDLINE, text={"other_languages": True, "title": False})
    assert documents[0].text.endswith("\n\n# Abstract (es)\nLa fiebre es frecuente.")
    assert documents[0].text.startswith("# Background\n")


def test_compressed_files_and_checksums(tmp_path):
    for file in MEDLINE.rglob("*.xml"):
        data = gzip.compress(file.read_bytes())
        (tmp_path / f"{file.name}.gz").write_bytes(data)
        digest = hashlib.md5(data).hexdigest()
        (tmp_path / f"{file.name}.gz.md5").write_text(f"MD5({file.name}.gz)= {digest}\n")
    documents, _ = read_source(medline, tmp_path)
    assert [document.text for document in documents] == [
        document.text for document in read_source(medline, MEDLINE)[0]
    ]
    (tmp_path / "pubmed26n1335.xml.gz.md5").write_text("0" * 32)
    documents, problems = read_source(medline, tmp_path)
    assert said(problems)[-1] == "pubmed26n1335.xml.gz |  | checksum"
    # Nothing of a file that is not what was published counts, so the first wording is back.
    assert "The first wording." in "".join(document.text for document in documents)


def test_a_broken_file_keeps_what_comes_before(tmp_path):
    (tmp_path / "pubmed26n0001.xml").write_bytes(article_set(article(1), article(2), "<oops>", article(3)))
    documents, problems = read_source(medline, tmp_path)
    assert [document.id for document in documents] == ["PMID:1", "PMID:2", "PMID:3"]
    assert said(problems) == ["pubmed26n0001.xml | record 3, line 5 | broken_xml"]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file(tmp_path, share):
    data = gzip.compress(
        article_set(*(article(number, f"Text {number * 7919 % 1000}.") for number in range(1, 2000)))
    )
    (tmp_path / "pubmed26n0001.xml.gz").write_bytes(data[: int(len(data) * share)])
    documents, problems = read_source(medline, tmp_path)
    assert 0 < len(documents) < 1999
    assert [document.id for document in documents] == [f"PMID:{n}" for n in range(1, len(documents) + 1)]
    assert said(problems) == [f"pubmed26n0001.xml.gz | after record {len(documents) - 1} | truncated"]


def test_not_gzip_and_a_damaged_byte(tmp_path):
    (tmp_path / "a.xml.gz").write_bytes(article_set(article(1)))
    data = bytearray(gzip.compress(article_set(*(article(n) for n in range(1, 500)))))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "b.xml.gz").write_bytes(bytes(data))
    with pytest.raises((zlib.error, EOFError, gzip.BadGzipFile)):
        gzip.decompress(bytes(data))
    _, problems = read_source(medline, tmp_path)
    assert [text.split(" | ")[0] for text in said(problems)] == ["a.xml.gz", "b.xml.gz"]
    assert {problem.reason for problem in problems} <= {Reason.TRUNCATED, Reason.BROKEN_XML}


def test_invalid_utf8_and_an_empty_file(tmp_path):
    (tmp_path / "a.xml").write_bytes(
        article_set(article(1), article(2, "caf\xe9")).replace("é".encode(), b"\xe9")
    )
    (tmp_path / "b.xml").write_bytes(b"")
    _, problems = read_source(medline, tmp_path)
    assert said(problems)[0].endswith("| invalid_utf8")
    assert said(problems)[1] == "b.xml | record 0 | empty"


BOMB = "<!DOCTYPE PubmedArticleSet [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;'>]>"
FILE = "<!DOCTYPE PubmedArticleSet [<!ENTITY a SYSTEM 'file:///etc/hostname'>]>"
PARAMETER = (
    "<!DOCTYPE PubmedArticleSet PUBLIC '-//x' 'x.dtd' [<!ENTITY % a SYSTEM 'file:///etc/hostname'> %a;]>"
)
HIDDEN = '<!-- > ] --><?pi ]>?>\n<!DOCTYPE PubmedArticleSet SYSTEM "a>b"  [ ]>'


@pytest.mark.parametrize("doctype", [BOMB, FILE, PARAMETER, HIDDEN])
def test_entities_of_its_own_are_refused(tmp_path, doctype):
    (tmp_path / "a.xml").write_bytes(
        article_set(article(1, "&b;" if doctype is BOMB else "x"), doctype=doctype)
    )
    documents, problems = read_source(medline, tmp_path)
    assert documents == []
    assert [problem.reason.value for problem in problems] == ["forbidden_xml"]


def test_a_record_that_is_too_large(tmp_path):
    (tmp_path / "a.xml").write_bytes(
        article_set(article(1), article(2, "<b>word </b>" * 100_000), article(3))
    )
    documents, problems = read_source(medline, tmp_path, max_record_bytes=200_000)
    assert [document.id for document in documents] == ["PMID:1"]
    assert said(problems)[0].endswith("| too_large")


def test_the_same_pmid_twice_in_a_file(tmp_path):
    (tmp_path / "a.xml").write_bytes(article_set(article(1, "One text."), article(1, "Another text.")))
    documents, problems = read_source(medline, tmp_path)
    assert [document.text for document in documents] == ["T\n\nAnother text."]
    assert said(problems) == ["a.xml | record 0 (line 2) | duplicate_id"]


def test_what_the_user_gets_wrong(tmp_path):
    for options, message in (
        ({"path": str(tmp_path / "no")}, "there is no file or directory"),
        ({"path": str(tmp_path)}, r"there is no file \*.xml"),
        ({"path": str(tmp_path), "chek_md5": False}, "chek_md5"),
    ):
        with pytest.raises(UserError, match=message):
            medline.shards(options)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(MEDLINE / "baseline" / "pubmed26n0001.xml", tmp_path / folder)
    with pytest.raises(UserError, match="the same file"):
        medline.shards({"path": str(tmp_path)})
