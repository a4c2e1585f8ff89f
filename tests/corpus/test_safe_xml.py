"""What is refused of XML, what is accepted, and that long files are read as a stream."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from meditron_train.corpus.document import Reason
from meditron_train.corpus.safe_xml import XmlProblem, parse_document, stream_elements, without_doctype


@pytest.mark.parametrize(
    "head",
    [
        b"<a/>",
        b"\xef\xbb\xbf<?xml version='1.0' encoding='UTF-8'?>\n<a/>",
        b"<?xml version='1.0'?><!-- [ --><!DOCTYPE a><a/>",
        b'<!DOCTYPE a PUBLIC "-//x y//EN" "http://example.org/a.dtd"  ><a/>',
        b"<!DOCTYPE a\nSYSTEM\n'a>[b.dtd'\n><a/>",
        b"<?xml version='1.0' encoding='ISO-8859-1'?><a>\xe9</a>",
    ],
)
def test_accepted(head):
    bare = without_doctype(head)
    assert b"DOCTYPE" not in bare
    assert (len(bare), bare.count(b"\n")) == (len(head), head.count(b"\n"))
    assert parse_document(head).tag == "a"


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"<!DOCTYPE a []><a/>", Reason.FORBIDDEN_XML),
        (b"<!DOCTYPE a SYSTEM 'x.dtd' [<!ENTITY b 'c'>]><a/>", Reason.FORBIDDEN_XML),
        (b"<!DOCTYPE a PUBLIC 'x' \"y\"[<!ATTLIST a b CDATA 'c'>]><a/>", Reason.FORBIDDEN_XML),
        (b"<!-- x --><?p?>\n<!DOCTYPE\ta\n[", Reason.FORBIDDEN_XML),
        (b"<!DOCTYPE a SYSTEM 'never closed", Reason.FORBIDDEN_XML),
        ("<a/>".encode("utf-16"), Reason.INVALID_UTF8),
        (b"<?xml version='1.0' encoding='UTF-7'?><a/>", Reason.INVALID_UTF8),
        (b"<?xml version='1.0' encoding=\"cp037\"?><a/>", Reason.INVALID_UTF8),
    ],
)
def test_refused(head, reason):
    with pytest.raises(XmlProblem) as caught:
        without_doctype(head)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("source", "reason", "line"),
    [
        (b"", Reason.EMPTY, 0),
        (b" \n", Reason.EMPTY, 0),
        (b"<a>\n<b></a>", Reason.BROKEN_XML, 2),
        (b"<a>\n\n\xff</a>", Reason.INVALID_UTF8, 3),
        (b"<a>&b;</a>", Reason.BROKEN_XML, 1),
        (b"<a>" + b"x" * 10_500_000 + b"</a>", Reason.FORBIDDEN_XML, 1),
        (b"<a>" * 1000, Reason.FORBIDDEN_XML, 1),
    ],
)
def test_problems_have_a_line(source, reason, line):
    with pytest.raises(XmlProblem) as caught:
        parse_document(source)
    assert (caught.value.reason, caught.value.line) == (reason, line)


@pytest.mark.parametrize(
    "content", ["<!ENTITY leak 'leaked'>", "this is no DTD, and reading it would be an error"]
)
def test_external_files_are_not_read(tmp_path, content):
    secret = tmp_path / "secret.dtd"
    secret.write_text(content)
    source = f'<!DOCTYPE a SYSTEM "{secret}"><a><b>&leak;</b></a>'.encode()
    assert "leaked" not in "".join(parse_document(source).itertext())
    with pytest.raises(XmlProblem, match="Entity 'leak' not defined"):
        list(stream_elements(io.BytesIO(source), ("b",), 1 << 20))


def test_nothing_is_fetched_from_the_network():
    source = b'<!DOCTYPE a SYSTEM "http://localhost:9/x.dtd"><a><b/></a>'
    assert parse_document(source).tag == "a"
    assert len(list(stream_elements(io.BytesIO(source), ("b",), 1 << 20))) == 1


def test_a_stream_forgets_what_it_has_given():
    source = b"<r>" + b"".join(b"<x><y>%d</y></x>\n" % n for n in range(20_000)) + b"<z/></r>"
    kept, seen = [], []
    for element in stream_elements(io.BytesIO(source), ("x", "z"), 1 << 20):
        seen.append(element.findtext("y"))
        if len(seen) % 1000 == 0:
            kept.append(len(element.getparent()))
    assert seen == [*map(str, range(20_000)), None]
    assert max(kept) < 10_000  # at most what one piece of the file contains


MEMORY = """
import re, sys
from meditron_train.corpus.readers import medline
options = {"path": sys.argv[1]}
(shard,) = medline.shards(options)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
count = sum(1 for _ in medline.read(shard, options))
print(count, (peak() - before) // 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """32 MB of citations take less than 16 MB more than the program itself."""
    record = (
        "<PubmedArticle><MedlineCitation><PMID Version='1'>{}</PMID><Article><ArticleTitle>T</ArticleTitle><Abstract>"
        f"<AbstractText>{'word ' * 1600}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>\n"
    )
    with open(tmp_path / "a.xml", "w") as file:
        file.write("<PubmedArticleSet>")
        file.writelines(record.format(number) for number in range(4000))
        file.write("</PubmedArticleSet>")
    assert (tmp_path / "a.xml").stat().st_size > 32_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, grown_mib = map(int, done.stdout.split())
    assert count == 4000
    assert grown_mib < 16
