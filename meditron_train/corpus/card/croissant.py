"""The card as Croissant 1.0, the JSON-LD that dataset search and loaders read (docs.mlcommons.org/croissant)."""

from __future__ import annotations

from typing import Any

from meditron_train.corpus.card.facts import Facts

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FIELDS = {
    "id": "Identifier within the source.",
    "source": "Name of the source.",
    "license": "SPDX identifier, or the publisher's own code.",
    "url": "Where the document can be read, if known.",
    "text": "The text.",
}


def croissant(facts: Facts) -> dict[str, Any]:
    """The description of the .jsonl.zst files: where they lie, their hashes, and the fields of their records."""
    files, record_sets = [], []
    for name, sha256 in facts.files.items():
        if not name.startswith("documents/"):
            continue
        stem = name.removeprefix("documents/").removesuffix(".jsonl.zst")
        files.append(
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": stem,
                "contentUrl": name,
                "encodingFormat": "application/jsonlines",
                "sha256": sha256,
            }
        )
        record_sets.append(
            {
                "@type": "cr:RecordSet",
                "@id": stem,
                "name": stem,
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"{stem}/{field}",
                        "name": field,
                        "description": description,
                        "dataType": "sc:URL" if field == "url" else "sc:Text",
                        "source": {"fileObject": {"@id": name}, "extract": {"column": field}},
                    }
                    for field, description in _FIELDS.items()
                ],
            }
        )
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": facts.declared.name,
        "description": facts.description or facts.title,
        "inLanguage": list(facts.languages),
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "citeAs": "; ".join(
            " ".join(source["citation"].split()) for source in facts.sources if source["is_given"]
        ),
        "license": [_license_url(license) for license in facts.licenses],
        **({"url": facts.declared.url} if facts.declared.url else {}),
        "version": facts.declared.version,
        "distribution": files,
        "recordSet": record_sets,
    }


def _license_url(license: str) -> str:
    return license if license.startswith("LicenseRef-") else f"https://spdx.org/licenses/{license}.html"
