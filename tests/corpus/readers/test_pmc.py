"""PMC's articles in folders and in bundles against texts written by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from meditron_train.corpus.document import Reason
from meditron_train.corpus.readers import pmc, pmc_bundles
from meditron_train.errors import UserError
from tests.corpus.reading import FIXTURES, expected, read_source, said

PMC = FIXTURES / "pmc"
XML = (PMC / "PMC900001.2" / "PMC900001.2.xml").read_bytes()
BOMB = b"<!DOCTYPE article [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]><article><body><p>&b;</p></body></article>"


def write_article(root: Path, name: str, xml: bytes, **metadata: object) -> None:
    (root / name).mkdir(parents=True)
    (root / name / f"{name}.xml").write_bytes(xml)
    known = {"pmcid": name.split(".")[0], "license_code": "CC BY", "is_retracted": False, **metadata}
    (root / name / f"{name}.json").write_text(json.dumps(known))


def article(text: str, front: str = "") -> bytes:
    return (
        f"<article><front><article-meta>{front}</article-meta></front><body>{text}</body></article>".encode()
    )


def test_texts():
    documents, problems = read_source(pmc, PMC)
    assert [document.id for document in documents] == ["PMC900001", "PMC900004"]
    for document in documents:
        assert document.text == expected(f"{document.id}.txt")
    assert said(problems) == [
        "PMC900001.1 |  | superseded",
        "PMC900002.1 |  | retracted",
        "PMC900003.1 |  | ocr_only",
        "PMC900005.1.xml | line 13 | broken_xml",
        "PMC920006.1.xml |  | empty",
    ]


def test_metadata():
    documents, _ = read_source(pmc, PMC)
    assert documents[0].metadata == {
        "kind": "article",
        "article_type": "research-article",
        "title": "Zelapril in Borland fever",
        "journal": "Annals of Invented Medicine",
        "language": "en",
        "date": "2026-03-07",
        "pmid": "80000001",
        "pmcid": "PMC900001",
        "doi": "10.5555/aim.2026.1",
        "version": 2,
        "url": "https://pmc.ncbi.nlm.nih.gov/articles/PMC900001/",
        "license": "CC-BY-4.0",
        "license_code": "CC BY",
        "retracted": False,
        "is_ocr": False,
        "manuscript": False,
        "full_text": True,
    }
    assert documents[1].metadata["license"] == "LicenseRef-PMC-none"


def test_shards_are_ranges_of_ids_with_all_versions_together():
    shards = pmc.shards({"path": str(PMC), "ids_per_shard": 2})
    assert [shard.name for shard in shards] == [
        "PMC00000900000",
        "PMC00000900002",
        "PMC00000900004",
        "PMC00000920006",
    ]
    assert [path.name for path in shards[0].paths] == ["PMC900001.1", "PMC900001.2"]


def test_rules_can_be_changed():
    documents, _ = read_source(pmc, PMC, keep_retracted=True, keep_ocr=True, require_body=False)
    assert [document.id for document in documents] == [
        f"PMC{n}" for n in (900001, 900002, 900003, 900004, 920006)
    ]
    assert documents[1].metadata["retracted"] is True
    assert documents[4].metadata["full_text"] is False
    assert documents[4].text == "An empty article\n\n# Abstract\nA short abstract."


def test_bad_articles_are_reported(tmp_path):
    write_article(tmp_path, "PMC1.1", BOMB)
    write_article(tmp_path, "PMC2.1", article("<p>café</p>").replace("é".encode(), b"\xe9"))
    write_article(tmp_path, "PMC3.1", b"")
    write_article(tmp_path, "PMC4.1", article("<p>" + "word " * 50_000 + "</p>"))
    write_article(tmp_path, "PMC5.1", article("<p>Text.</p>"), xml_url="s3://x/y.xml?md5=" + "0" * 32)
    write_article(tmp_path, "PMC6.1", article("<p>Text.</p>"))
    (tmp_path / "PMC6.1" / "PMC6.1.xml").unlink()
    write_article(tmp_path, "PMC7.1", article("<p>Text.</p>"))
    (tmp_path / "PMC7.1" / "PMC7.1.json").unlink()
    write_article(tmp_path, "PMC8.1", article("<p>Text.</p>"))
    (tmp_path / "PMC8.1" / "PMC8.1.json").write_text("{")
    write_article(tmp_path, "PMC9.1", article("<p>Text.</p>"), pmcid="PMC10")
    write_article(tmp_path, "PMC11.1", b"<html><p>not found</p></html>")
    write_article(tmp_path, "PMC12.1", b"<a>" * 300 + b"</a>" * 300)
    write_article(tmp_path, "PMC13.1", article("<p>Good.</p>"))
    documents, problems = read_source(pmc, tmp_path, max_record_bytes=200_000)
    assert [document.text for document in documents] == ["Good."]
    assert said(problems) == [
        "PMC1.1.xml | line 1 | forbidden_xml",
        "PMC2.1.xml | line 1 | invalid_utf8",
        "PMC3.1.xml |  | empty",
        "PMC4.1.xml |  | too_large",
        "PMC5.1.xml |  | checksum",
        "PMC6.1.xml |  | missing",
        "PMC7.1 |  | missing",
        "PMC8.1.json | line 1 | broken_json",
        "PMC9.1.json |  | broken_json",
        "PMC11.1.xml | line 1 | broken_file",
        "PMC12.1.xml | line 1 | forbidden_xml",
    ]


def write_inventory(directory: Path, keys: list[str], checksum: str | None = None) -> Path:
    """As the bucket's daily inventory: manifest.json in a dated folder, csv.gz in data/."""
    rows = "".join(f'"pmc-oa-opendata","{key}","2026-11-01T00:00:00.000Z","{"0" * 32}"\n' for key in keys)
    (directory / "data").mkdir(parents=True)
    listed = directory / "data" / "part.csv.gz"
    listed.write_bytes(gzip.compress(rows.encode(), mtime=0))
    manifest = directory / "2026-11-01T01-00Z" / "manifest.json"
    manifest.parent.mkdir()
    entry = {
        "key": "inventory-reports/pmc-oa-opendata/metadata/data/part.csv.gz",
        "size": listed.stat().st_size,
        "MD5checksum": checksum or hashlib.md5(listed.read_bytes()).hexdigest(),
    }
    values = {
        "sourceBucket": "pmc-oa-opendata",
        "version": "2016-11-30",
        "creationTimestamp": "1793494800000",
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key, LastModifiedDate, ETag",
        "files": [entry],
    }
    manifest.write_text(json.dumps(values))
    return manifest


def test_inventory(tmp_path):
    keys = [
        "metadata/PMC900001.2.json",
        "metadata/PMC900004.1.json",
        "metadata/PMC999999.1.json",
        "metadata/",
    ]
    manifest = write_inventory(tmp_path, keys)
    _, problems = read_source(pmc, PMC, inventory=str(manifest))
    missing = [problem for problem in problems if problem.reason is Reason.MISSING]
    assert said(missing) == ["part.csv.gz | line 3 | missing"]
    assert missing[0].detail == f"PMC999999.1 is not in {PMC}"
    recorded = pmc.provenance({"path": str(PMC), "inventory": str(manifest)})
    assert recorded["inventory_date"] == "2026-11-01T01:00:00+00:00"
    assert recorded["inventory_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    listed = hashlib.sha256((tmp_path / "data" / "part.csv.gz").read_bytes()).hexdigest()
    assert list(recorded["inventory_files_sha256"].values()) == [listed]
    assert pmc.provenance({"path": str(PMC)}) == {}


def test_the_inventory_finds_articles_at_any_depth(tmp_path):
    shutil.copytree(PMC / "PMC900001.2", tmp_path / "a" / "b" / "c" / "PMC900001.2")
    manifest = write_inventory(tmp_path / "i", ["metadata/PMC900001.2.json", "metadata/PMC900001.3.json"])
    _, problems = read_source(pmc, tmp_path / "a", inventory=str(manifest))
    assert said(problems) == ["part.csv.gz | line 2 | missing"]


def test_bad_inventories(tmp_path):
    manifest = write_inventory(tmp_path / "a", ["metadata/PMC900001.2.json"], checksum="0" * 32)
    assert said(read_source(pmc, PMC, inventory=str(manifest))[1])[-1] == "part.csv.gz |  | checksum"
    (tmp_path / "a" / "data" / "part.csv.gz").unlink()
    assert said(read_source(pmc, PMC, inventory=str(manifest))[1])[-1] == "manifest.json |  | missing"
    manifest.write_text("{}")
    with pytest.raises(UserError, match="is not the manifest.json of an inventory"):
        read_source(pmc, PMC, inventory=str(manifest))
    with pytest.raises(UserError, match="there is no folder such as PMC123456.1"):
        pmc.shards({"path": str(tmp_path)})


def write_bundle(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_bundles(tmp_path):
    license = (
        '<permissions><license xmlns:xlink="http://www.w3.org/1999/xlink" xlink:href="{}"/></permissions>'
    )
    by = article("<p>Second text.</p>", license.format("http://creativecommons.org/licenses/by-nc/4.0/"))
    members = {
        "PMC000xxxxxx/PMC1.xml": article("<p>First text.</p>"),
        "PMC000xxxxxx/PMC2.xml": by,
        "readme.txt": b"x",
    }
    write_bundle(tmp_path / "oa_comm_xml.PMC000xxxxxx.baseline.2025-12-18.tar.gz", members)
    (tmp_path / "oa_comm_xml.PMC000xxxxxx.baseline.2025-12-18.filelist.csv").write_text(
        "Article File,Article Citation,AccessionID,LastUpdated (YYYY-MM-DD HH:MM:SS),PMID,License,Retracted\n"
        "PMC000xxxxxx/PMC1.xml,Cit,PMC1,2025-01-01 00:00:00,11,CC BY,no\n"
        "PMC000xxxxxx/PMC2.xml,Cit,PMC2,2025-01-01 00:00:00,12,CC BY-NC,no\n"
    )
    later = {
        "PMC000xxxxxx/PMC1.xml": article("<p>First text, improved.</p>"),
        "PMC3/journal.nxml": XML,
        "PMC000xxxxxx/PMC4.xml": b"<article>",
        "PMC000xxxxxx/PMC5.xml": BOMB,
        "other/x.xml": b"<article/>",
    }
    write_bundle(tmp_path / "oa_comm_xml.incr.2026-02-01.tar.gz", later)
    documents, problems = read_source(pmc_bundles, tmp_path)
    assert [(document.id, document.text) for document in documents] == [
        ("PMC2", "Second text."),
        ("PMC1", "First text, improved."),
        ("PMC3", expected("PMC900001.txt")),
    ]
    assert documents[0].metadata["license"] == "CC-BY-NC-4.0"
    assert documents[2].metadata["license"] == "CC-BY-4.0"
    assert said(problems) == [
        "oa_comm_xml.PMC000xxxxxx.baseline.2025-12-18.tar.gz | PMC000xxxxxx/PMC1.xml | superseded",
        "oa_comm_xml.incr.2026-02-01.tar.gz | PMC000xxxxxx/PMC4.xml, line 1 | broken_xml",
        "oa_comm_xml.incr.2026-02-01.tar.gz | PMC000xxxxxx/PMC5.xml, line 1 | forbidden_xml",
        "oa_comm_xml.incr.2026-02-01.tar.gz | other/x.xml | broken_file",
    ]


def test_a_retracted_article_in_a_bundle(tmp_path):
    write_bundle(tmp_path / "a.tar.gz", {"PMC1.xml": article("<p>Text.</p>")})
    (tmp_path / "a.filelist.csv").write_text("AccessionID,License,Retracted\nPMC1,CC0,yes\n")
    documents, problems = read_source(pmc_bundles, tmp_path)
    assert documents == []
    assert said(problems) == ["a.tar.gz | PMC1.xml | retracted"]


def test_a_truncated_bundle(tmp_path):
    texts = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(300)]  # hard to compress
    write_bundle(
        tmp_path / "whole.tar.gz", {f"PMC{n}.xml": article(f"<p>{t}</p>") for n, t in enumerate(texts)}
    )
    data = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "whole.tar.gz").write_bytes(data[: len(data) // 2])
    documents, problems = read_source(pmc_bundles, tmp_path)
    assert 50 < len(documents) < 250
    assert [problem.reason for problem in problems] == [Reason.TRUNCATED]
    shutil.rmtree(tmp_path)
