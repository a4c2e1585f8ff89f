"""From the bytes of a JATS article to a document: what the readers of PubMed Central share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meditron_train.corpus.document import Document, Problem, Reason
from meditron_train.corpus.options import ReaderOptions
from meditron_train.corpus.safe_xml import XmlProblem, parse_document
from meditron_train.corpus.text.jats import article_text
from meditron_train.corpus.text.jats_metadata import article_metadata, has_body
from meditron_train.corpus.text.rules import Removed


class ArticleOptions(ReaderOptions):
    """Which articles of PubMed Central are left out."""

    keep_retracted: bool = False
    keep_ocr: bool = False
    """Keep articles whose text was only read from scanned pages."""
    require_body: bool = True
    """Leave out articles of which there is only the abstract."""


def left_out(
    file: str, where: str, options: ArticleOptions, *, retracted: bool, is_ocr: bool
) -> Problem | None:
    """The problem of an article that the rules leave out; None if they do not."""
    if retracted and not options.keep_retracted:
        return Problem(file, where, Reason.RETRACTED, "the article has been retracted")
    if is_ocr and not options.keep_ocr:
        return Problem(file, where, Reason.OCR_ONLY, "the text was only read from scanned pages")
    return None


def article_document(
    data: bytes, file: str, where: str, options: ArticleOptions, known: Mapping[str, Any]
) -> Document | Problem:
    """The document of an article.

    Args:
        data: the XML.
        file, where: the file, and the member if it is an archive, for problems.
        known: what is known besides the article, with its `pmcid`; it precedes what the article says.
    """

    def problem(reason: Reason, line: int, detail: str) -> Problem:
        position = ", ".join(part for part in (where, f"line {line}" if line else "") if part)
        return Problem(file, position, reason, detail)

    if len(data) > options.max_record_bytes:
        return problem(
            Reason.TOO_LARGE, 0, f"{len(data)} bytes; max_record_bytes is {options.max_record_bytes}"
        )
    try:
        root = parse_document(data)
    except XmlProblem as error:
        return problem(error.reason, error.line, error.detail)
    article = root if root.tag == "article" else root.find(".//article")
    if article is None:
        return problem(
            Reason.BROKEN_FILE, root.sourceline, f"the root is <{root.tag}>; an <article> is needed"
        )
    full_text, removed = has_body(article), Removed()
    if options.require_body and not full_text:
        return problem(Reason.EMPTY, 0, "the article has no body")
    try:
        text = article_text(article, options.text, removed)
    except RecursionError:
        return problem(Reason.FORBIDDEN_XML, 0, "elements are nested too deeply")
    if not text:
        return problem(Reason.EMPTY, 0, "the article has no text")
    found = {**article_metadata(article), "full_text": full_text}
    found.update({key: value for key, value in known.items() if value is not None})
    pmcid = found["pmcid"]
    found.setdefault("url", f"https://pmc.ncbi.nlm.nih.gov/articles/{pmcid}/")
    return Document(pmcid, text, found, removed)
