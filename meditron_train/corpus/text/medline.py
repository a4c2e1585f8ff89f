"""MEDLINE/PubMed citations as text and metadata."""

from __future__ import annotations

import re
from typing import Any

from meditron_train.corpus.text.math import MATHML, mathml_formula
from meditron_train.corpus.text.rules import BLANK, FORMULA, FORMULA_END, LINE, Removed, TextRules, finish

_MONTHS = {
    name: f"{number:02d}"
    for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)
}
_LANGUAGES = {
    "eng": "en",
    "fre": "fr",
    "ger": "de",
    "spa": "es",
    "ita": "it",
    "por": "pt",
    "rus": "ru",
    "chi": "zh",
    "jpn": "ja",
    "dut": "nl",
    "pol": "pl",
    "kor": "ko",
    "dan": "da",
    "swe": "sv",
    "nor": "no",
    "fin": "fi",
    "cze": "cs",
    "hun": "hu",
    "tur": "tr",
    "heb": "he",
    "ukr": "uk",
    "hrv": "hr",
    "srp": "sr",
    "bul": "bg",
    "rum": "ro",
    "gre": "el",
    "ara": "ar",
}
"""MEDLINE's codes, ISO 639-2/B, as ISO 639-1."""
_RETRACTED_TYPES = frozenset({"Retracted Publication"})
_RETRACTED_BY = frozenset({"RetractionIn", "RetractedandRepublishedIn"})
_CORRECTED_BY = _RETRACTED_BY | {
    "ErratumIn",
    "ExpressionOfConcernIn",
    "CorrectedandRepublishedIn",
    "UpdateIn",
}
_NUMBER, _VERSION = re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9]{1,9}")
_YEAR = re.compile(r"\b(1[5-9]|20)\d\d\b")


def pmid_and_version(record: Any) -> tuple[int, int] | None:
    """Of a PubmedArticle or PubmedBookArticle; None where it has no PMID."""
    cited = next(record.iterchildren("MedlineCitation", "BookDocument"), None)
    return parse_pmid(next(cited.iterchildren("PMID"), None)) if cited is not None else None


def parse_pmid(element: Any) -> tuple[int, int] | None:
    """Number and version of a PMID element."""
    number = (element.text or "").strip() if element is not None else ""
    version = (element.get("Version") or "1") if number else ""
    return (int(number), int(version)) if _NUMBER.fullmatch(number) and _VERSION.fullmatch(version) else None


def citation(record: Any, rules: TextRules, removed: Removed) -> tuple[str, bool, dict[str, Any]]:
    """Text, whether it has an abstract, and metadata of a PubmedArticle or PubmedBookArticle that has a PMID."""
    parts = _children(record)
    if "MedlineCitation" in parts:
        cited = _children(parts["MedlineCitation"])
        article = _children(cited.get("Article", ()))
        others = parts["MedlineCitation"].iterchildren("OtherAbstract")
        found = {
            "kind": "abstract",
            **_article_metadata(cited, article),
            **_identifiers(parts.get("PubmedData")),
        }
    else:
        article, others = _children(parts["BookDocument"]), iter(())
        found = {"kind": "book", **_book_metadata(article), **_identifiers(parts.get("PubmedBookData"))}
        found.update(_identifiers(parts["BookDocument"]))
    title = _inline(article.get("ArticleTitle"), rules) or str(found.get("book", ""))
    out = [title, BLANK] if rules.title else []
    has_abstract = "Abstract" in article and _abstract(article["Abstract"], "", rules, out)
    language = found.get("language", "en")
    for other in others:
        own = _LANGUAGES.get(other.get("Language") or "eng", other.get("Language"))
        suffix = f" ({own})" if own != language else ""
        if (own == language and not has_abstract) or (own == "en" != language) or rules.other_languages:
            has_abstract = _abstract(other, suffix, rules, out) or has_abstract
    text = finish("".join(out), rules, removed)
    found["title"] = text.split("\n", 1)[0] if rules.title and title else finish(title, rules, Removed())
    return text, has_abstract, {key: value for key, value in found.items() if value}


def _children(element: Any) -> dict[str, Any]:
    """What an element contains by tag, the last of each: one pass costs less than a search for each."""
    return {child.tag: child for child in element}


def _abstract(abstract: Any, suffix: str, rules: TextRules, out: list[str]) -> bool:
    """Write an abstract, structured ones with a header for each part. False if it is empty."""
    parts = [
        (part.get("Label") or "", _inline(part, rules)) for part in abstract.iterchildren("AbstractText")
    ]
    parts = [(label, text) for label, text in parts if text]
    structured = any(label and label.upper() != "UNLABELLED" for label, _ in parts)
    if suffix and parts:
        out += [BLANK, "# Abstract", suffix, LINE]
    level = "## " if suffix else "# "
    for label, text in parts:
        if structured and label and label.upper() != "UNLABELLED":
            out += [BLANK, level, label.capitalize() if label.isupper() else label, LINE]
        out += [text, LINE]
    return bool(parts)


def _inline(element: Any, rules: TextRules) -> str:
    """The text of an element with the few kinds of formatting that MEDLINE has."""
    if element is None:
        return ""
    if len(element) == 0:
        return (element.text or "").strip()
    out: list[str] = []
    _write(element, rules, out)
    return "".join(out).strip()


def _write(element: Any, rules: TextRules, out: list[str]) -> None:
    out.append(element.text or "")
    for child in element:
        if child.tag == MATHML + "math":
            if rules.formulas:
                out += [FORMULA, mathml_formula(child), FORMULA_END]
        elif child.tag == "sup":
            text = "".join(child.itertext())
            out += ["^" if rules.superscripts == "caret" and any(c.isdigit() for c in text) else "", text]
        else:
            _write(child, rules, out)
        out.append(child.tail or "")


def _article_metadata(cited: dict[str, Any], article: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _numbered(cited)
    if "Language" in article:
        first = next(article["Language"].getparent().iterchildren("Language")).text or ""
        found["language"] = _LANGUAGES.get(first, first)
    journal = _children(article.get("Journal", ()))
    found["journal"] = journal["Title"].text if "Title" in journal else None
    found["date"] = _date(article.get("ArticleDate"))
    if found["date"] is None and "JournalIssue" in journal:
        found["date"] = _date(next(journal["JournalIssue"].iterchildren("PubDate"), None))
    found["publication_types"] = [kind.text or "" for kind in article.get("PublicationTypeList", ())]
    if "ELocationID" in article:
        for place in article["ELocationID"].getparent().iterchildren("ELocationID"):
            if place.get("EIdType") == "doi" and place.get("ValidYN") != "N" and place.text:
                found["doi"] = place.text.strip().lower()
    corrections = []
    for mark in cited.get("CommentsCorrectionsList", ()):
        if mark.get("RefType") in _CORRECTED_BY:
            by = mark.findtext("PMID") or mark.findtext("RefSource")
            corrections.append({"type": mark.get("RefType"), "by": by})
    found["corrections"] = corrections
    found["retracted"] = not _RETRACTED_TYPES.isdisjoint(found["publication_types"]) or any(
        mark["type"] in _RETRACTED_BY for mark in corrections
    )
    return found


def _numbered(parts: dict[str, Any]) -> dict[str, Any]:
    """PMID, version and address."""
    number = parse_pmid(parts.get("PMID"))
    if number is None:
        return {}
    return {
        "pmid": str(number[0]),
        "version": number[1],
        "url": f"https://pubmed.ncbi.nlm.nih.gov/{number[0]}/",
    }


def _book_metadata(document: dict[str, Any]) -> dict[str, Any]:
    book = _children(document.get("Book", ()))
    language = document["Language"].text if "Language" in document else "eng"
    return {
        **_numbered(document),
        "book": " ".join("".join(book["BookTitle"].itertext()).split()) if "BookTitle" in book else "",
        "date": _date(document.get("ContributionDate")) or _date(book.get("PubDate")),
        "language": _LANGUAGES.get(language, language),
    }


def _identifiers(data: Any) -> dict[str, Any]:
    """DOI and PMCID of a PubmedData, PubmedBookData or BookDocument."""
    found: dict[str, Any] = {}
    listed = next(data.iterchildren("ArticleIdList"), ()) if data is not None else ()
    for number in listed:
        kind, value = number.get("IdType"), (number.text or "").strip()
        if kind == "doi" and value:
            found["doi"] = value.lower()
        elif kind == "pmc" and value:
            found["pmcid"] = "PMC" + value.upper().removeprefix("PMC")
        elif kind == "bookaccession" and value:
            found["bookaccession"] = value
    return found


def _date(date: Any) -> str | None:
    """ISO 8601, as exact as it is known."""
    parts = {child.tag: (child.text or "").strip() for child in date} if date is not None else {}
    year, month, day = parts.get("Year", ""), parts.get("Month", ""), parts.get("Day", "")
    if not year:
        match = _YEAR.search(parts.get("MedlineDate", ""))
        return match.group() if match else None
    month = month.zfill(2) if month.isdecimal() else _MONTHS.get(month[:3].lower(), "")
    if not month:
        return year
    return f"{year}-{month}-{day.zfill(2)}" if day.isdecimal() else f"{year}-{month}"
