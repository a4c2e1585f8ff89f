"""Untrusted XML: an external DOCTYPE is accepted and taken out, everything else that could do harm is refused.

Refused are internal subsets (so that there are no entities but XML's five and, by name only, HTML's
characters), other encodings than those in which the prolog can be checked, and what libxml2 refuses without
`huge_tree`: more than 256 levels, texts of more than 10 MB. Nothing is fetched, neither from the network nor
from the disk.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import IO, Any

from lxml import etree

from meditron_train.corpus.document import Reason

_PROLOG_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 16
_ENCODINGS = frozenset({"utf-8", "us-ascii", "ascii", "iso-8859-1", "windows-1252"})
_SKIPPED = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->", re.S)
_DOCTYPE = re.compile(rb"""<!DOCTYPE\s+[^\s<>\["']+(?:\s+|"[^"]*"|'[^']*'|PUBLIC|SYSTEM)*(.)""", re.S)
_ENCODING = re.compile(rb"""^<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
_SETTINGS: dict[str, Any] = {
    "resolve_entities": False,
    "load_dtd": False,
    "no_network": True,
    "dtd_validation": False,
    "attribute_defaults": False,
    "huge_tree": False,
    "remove_comments": True,
    "remove_pis": True,
}
# Only for documents without a DOCTYPE: with collect_ids=False lxml has libxml2 load the external DTD.
_FASTER_SETTINGS = {**_SETTINGS, "collect_ids": False}
_NAMED_ENTITY = re.compile(rb"&(?!#|amp;|lt;|gt;|quot;|apos;)")


class XmlProblem(Exception):
    """Why a document cannot be read further; `line` counts from 1, 0 where it is not known."""

    def __init__(self, reason: Reason, line: int, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.line, self.detail = reason, line, detail


def without_doctype(head: bytes) -> bytes:
    """The beginning of a document with spaces in place of its DOCTYPE.

    Raises:
        XmlProblem: something precedes the root that may not.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise XmlProblem(Reason.INVALID_UTF8, 1, "the file is UTF-16; convert it to UTF-8")
    position = 3 if head[:3] == b"\xef\xbb\xbf" else 0
    declared = _ENCODING.match(head[position:])
    if declared and declared[1].decode("ascii", "replace").lower() not in _ENCODINGS:
        raise XmlProblem(
            Reason.INVALID_UTF8, 1, f"the encoding {declared[1]!r} is not read; convert the file to UTF-8"
        )
    while match := _SKIPPED.match(head, position):
        position = match.end()
    if not head.startswith(b"<!", position):
        return head
    line = head.count(b"\n", 0, position) + 1
    doctype = _DOCTYPE.match(head, position)
    if doctype is None or doctype[1] != b">":
        raise XmlProblem(
            Reason.FORBIDDEN_XML, line, "the DOCTYPE has an internal subset, which may define entities"
        )
    return head[:position] + re.sub(rb"[^\n]", b" ", doctype[0]) + head[doctype.end() :]


def parse_document(data: bytes) -> Any:
    """The root element of a whole document.

    Raises:
        XmlProblem: there is none.
    """
    if not data or data.isspace():
        raise XmlProblem(Reason.EMPTY, 0, "the file is empty")
    bare = without_doctype(data[:_PROLOG_BYTES]) + data[_PROLOG_BYTES:]
    # Without a DOCTYPE an entity such as &alpha; would be an error; with it, it is left to `entity_text`.
    data, settings = (data, _SETTINGS) if _NAMED_ENTITY.search(data) else (bare, _FASTER_SETTINGS)
    try:
        return etree.fromstring(data, etree.XMLParser(**settings))
    except etree.XMLSyntaxError as error:
        raise _explained(error) from None


def stream_elements(file: IO[bytes], tags: tuple[str, ...], max_bytes: int) -> Iterator[Any]:
    """The elements with these tags, which must not be nested in each other, while the file is read.

    Each is valid until the next one is asked for. There are no entities but XML's five.

    Raises:
        XmlProblem: the file cannot be read further, or an element, or what lies between two, exceeds
            max_bytes.
    """
    parser = etree.XMLPullParser(events=("end",), tag=tags, **_FASTER_SETTINGS)
    head = b""
    while len(head) < _PROLOG_BYTES and (chunk := file.read(_PROLOG_BYTES - len(head))):
        head += chunk
    if not head.strip():
        raise XmlProblem(Reason.EMPTY, 0, "the file is empty")
    chunk, since_last, line = without_doctype(head), 0, 0
    while chunk:
        failure: XmlProblem | None
        try:
            parser.feed(chunk)
        except etree.XMLSyntaxError as error:
            failure = _explained(error)  # what was complete before it is still there
        else:
            # An undeclared entity ends the document, but lxml says so only in its log.
            fatal = next(iter(parser.feed_error_log.filter_from_fatals()), None)
            failure = XmlProblem(Reason.BROKEN_XML, fatal.line, fatal.message) if fatal is not None else None
        since_last += len(chunk)
        for _, element in parser.read_events():
            since_last, line = 0, element.sourceline
            yield element
            _forget(element)
        if failure is not None:
            raise failure
        if since_last > max_bytes:
            raise XmlProblem(Reason.TOO_LARGE, line, f"a record is larger than {max_bytes} bytes")
        chunk = file.read(_CHUNK_BYTES)
    try:
        parser.close()
    except etree.XMLSyntaxError as error:
        raise _explained(error) from None


def _forget(element: Any) -> None:
    """Free an element and everything before it."""
    element.clear(keep_tail=False)
    parent = element.getparent()
    while parent is not None and element.getprevious() is not None:
        del parent[0]


def entity_text(entity: Any) -> str:
    """The character of an entity of HTML that the file does not declare, such as &alpha;; "" for any other."""
    text: str = html.unescape(entity.text)
    return "" if text == entity.text else text


_REASONS = {
    etree.ErrorTypes.ERR_INVALID_ENCODING: Reason.INVALID_UTF8,
    etree.ErrorTypes.ERR_DOCUMENT_EMPTY: Reason.EMPTY,
    etree.ErrorTypes.ERR_ENTITY_LOOP: Reason.FORBIDDEN_XML,
    114: Reason.FORBIDDEN_XML,  # XML_ERR_RESOURCE_LIMIT, which older lxml has no name for
}


def _explained(error: etree.XMLSyntaxError) -> XmlProblem:
    return XmlProblem(_REASONS.get(error.code, Reason.BROKEN_XML), error.lineno or 0, str(error.msg))
