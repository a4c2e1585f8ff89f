"""What is known about a JATS article besides its text."""

from __future__ import annotations

import html
from copy import deepcopy
from typing import Any

from lxml import etree

from meditron_train.corpus.licenses import spdx_of_url

_XLINK = "{http://www.w3.org/1999/xlink}href"
_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_LICENSE_REF = "{http://www.niso.org/schemas/ali/1.0/}license_ref"


def has_body(article: Any) -> bool:
    """Whether it is a full text and not only an abstract."""
    body = article.find("body")
    return body is not None and any(text.strip() for text in body.itertext())


def article_metadata(article: Any) -> dict[str, Any]:
    """Title, identifiers, date, language and stated license of an article element; what is unknown is left out."""
    meta = article.find("front/article-meta")
    found: dict[str, Any] = {"kind": "article", "article_type": article.get("article-type")}
    found["language"] = _language(article.get(_LANG))
    if meta is not None:
        title = meta.find("title-group/article-title")
        if title is not None:
            if next(title.iter("xref", "fn"), None) is not None:
                title = deepcopy(title)
                etree.strip_elements(title, "xref", "fn", with_tail=False)
            found["title"] = plain_text(title)
        for number in meta.findall("article-id"):
            _add_identifier(found, number.get("pub-id-type"), (number.text or "").strip())
        found["date"] = _date(meta.findall("pub-date"))
        found["license"] = _stated_license(meta)
    found["journal"] = plain_text(article.find("front/journal-meta//journal-title"))
    return {key: value for key, value in found.items() if value}


def _add_identifier(found: dict[str, Any], kind: str | None, value: str) -> None:
    if kind == "pmid" and value.isdecimal():
        found["pmid"] = value
    elif kind in ("pmc", "pmcid", "pmcaid") and value.upper().removeprefix("PMC").isdecimal():
        found["pmcid"] = "PMC" + value.upper().removeprefix("PMC")
    elif kind == "doi":
        found["doi"] = value.lower()


def _language(code: str | None) -> str | None:
    return code.split("-")[0].lower() if code else None


def _date(dates: list[Any]) -> str | None:
    """The earliest date of publication."""
    found = []
    for date in dates:
        parts = []
        for name, width in (("year", 4), ("month", 2), ("day", 2)):
            value = (date.findtext(name) or "").strip()
            if not value.isdecimal():
                break
            parts.append(value.zfill(width))
        if parts:
            found.append("-".join(parts))
    return min(found, default=None)


def _stated_license(meta: Any) -> str | None:
    for license in meta.iterfind("permissions/license"):
        urls = [license.get(_XLINK) or ""]
        urls += [(reference.text or "") for reference in license.iter(_LICENSE_REF)]
        urls += [link.get(_XLINK) or "" for link in license.iter("ext-link")]
        for url in urls:
            if identifier := spdx_of_url(url):
                return identifier
    return None


def plain_text(element: Any) -> str:
    """The text of an element on one line, without formatting."""
    if element is None:
        return ""
    text = " ".join(((element.text or "") if len(element) == 0 else "".join(element.itertext())).split())
    return html.unescape(text) if "&" in text else text
