"""PubMed Central's open access articles as they are distributed since August 2026.

PATH holds a folder PMC<id>.<version>/ for each article and version, at any depth, with PMC<id>.<version>.xml and .json;
the metadata may also lie in PATH/metadata/. A shard is all folders of a range of ids, so that all versions of an
article are in one shard and the newest wins without looking elsewhere. Retracted articles and those that were only read
from scanned pages are left out by what the JSON says, and the license is the JSON's. With `inventory` (the
manifest.json of the dated inventory) the last shard checks the inventory's checksums and reports the articles that it
has and PATH lacks.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
import orjson

from meditron_train.config.section import Count
from meditron_train.corpus.articles import ArticleOptions, article_document, left_out
from meditron_train.corpus.checksums import md5_file
from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.licenses import pmc_license
from meditron_train.corpus.options import NoInputError, existing, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers
from meditron_train.errors import UserError
from meditron_train.files import DAMAGED, sha256_file

_FOLDER = re.compile(r"^PMC([0-9]{1,12})\.([0-9]{1,4})$")
_METADATA_KEY = re.compile(r"(?:^|/)(PMC[0-9]{1,12}\.[0-9]{1,4})\.json$")
_INVENTORY_SHARD = "inventory"


class Options(ArticleOptions):
    """Of the reader pmc."""

    inventory: Path | None = None
    """manifest.json of the inventory; its csv.gz files lie beside it, in its folder data/, or under PATH."""
    ids_per_shard: Count = 20_000
    """A shard is the articles of so many neighboring PMC ids."""
    check_md5: bool = True
    """Compare the XML with the checksum in the JSON."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """Ranges of ids, and the inventory last.

    Raises:
        NoInputError: there are no articles.
    """
    settings = parse_options(Options, options)
    groups: dict[int, list[tuple[int, int, Path]]] = {}
    for folder in _article_folders(existing(settings.path)):
        number, version = _numbers(folder)
        groups.setdefault(number // settings.ids_per_shard, []).append((number, version, folder))
    found = [
        Shard(
            f"PMC{group * settings.ids_per_shard:011d}", tuple(folder for *_, folder in sorted(groups[group]))
        )
        for group in sorted(groups)
    ]
    if not found:
        raise NoInputError(f"there is no folder such as PMC123456.1 in {settings.path}")
    if settings.inventory is not None:
        found.append(Shard(_INVENTORY_SHARD, (existing(settings.inventory),)))
    return found


def sidecars(shard: Shard, options: Mapping[str, Any]) -> Iterator[Path]:
    """Files outside the folders of the shard that are read with them, where they are there."""
    settings = parse_options(Options, options)
    if shard.name == _INVENTORY_SHARD:
        keys = (entry["key"] for entry in _manifest(existing(shard.paths[0]))["files"])
        return (path for key in keys if (path := _inventory_file(settings, key)))
    return (path for folder in shard.paths for path in _metadata_paths(folder, settings)[1:])


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """No claims: all versions of an article are in one shard."""
    return iter(())


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The newest version of each article, by its rules."""
    settings = parse_options(Options, options)
    if shard.name == _INVENTORY_SHARD:
        yield from _missing_articles(settings)
        return
    for number, group in groupby(shard.paths, key=lambda folder: _numbers(folder)[0]):
        *older, newest = sorted(group, key=lambda folder: (_numbers(folder)[1], str(folder)))
        for folder in older:
            reason = Reason.DUPLICATE_ID if folder.name == newest.name else Reason.SUPERSEDED
            yield Problem(str(folder), "", reason, f"{newest} is kept", f"PMC{number}")
        found = _article(newest, number, settings)
        yield replace(found, id=f"PMC{number}") if isinstance(found, Problem) else found


def provenance(options: Mapping[str, Any]) -> dict[str, Any]:
    """Date and hashes of the inventory; empty without one."""
    settings = parse_options(Options, options)
    if settings.inventory is None:
        return {}
    manifest = _manifest(existing(settings.inventory))
    created_s = int(manifest.get("creationTimestamp", 0)) / 1000
    files = {entry["key"]: _inventory_file(settings, entry["key"]) for entry in manifest["files"]}
    return {
        "inventory": str(settings.inventory),
        "inventory_date": datetime.fromtimestamp(created_s, UTC).isoformat(),
        "inventory_sha256": sha256_file(settings.inventory),
        "inventory_files_sha256": {key: sha256_file(path) if path else None for key, path in files.items()},
    }


def _article_folders(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        folders = [entry.name for entry in entries if entry.is_dir()]
    for name in folders:
        if _FOLDER.match(name):
            yield directory / name
        else:
            yield from _article_folders(directory / name)


def _numbers(folder: Path) -> tuple[int, int]:
    """Id and version of an article's folder."""
    number, version = folder.name.removeprefix("PMC").split(".")
    return int(number), int(version)


def _article(folder: Path, number: int, options: Options) -> Document | Problem:
    name = folder.name
    described = next((path for path in _metadata_paths(folder, options) if path.is_file()), None)
    if described is None:
        return Problem(str(folder), "", Reason.MISSING, f"there is no {name}.json")
    try:
        known = orjson.loads(described.read_bytes())
    except orjson.JSONDecodeError as error:
        return Problem(str(described), f"line {error.lineno}", Reason.BROKEN_JSON, str(error))
    if not isinstance(known, dict) or str(known.get("pmcid")).removeprefix("PMC") != str(number):
        return Problem(str(described), "", Reason.BROKEN_JSON, f"is no metadata of the article PMC{number}")
    is_ocr, retracted = known.get("is_historical_ocr") is True, known.get("is_retracted") is True
    if dropped := left_out(str(folder), "", options, retracted=retracted, is_ocr=is_ocr):
        return dropped
    path = folder / f"{name}.xml"
    try:
        if path.stat().st_size > options.max_record_bytes:
            return Problem(str(path), "", Reason.TOO_LARGE, f"more than {options.max_record_bytes} bytes")
        data = path.read_bytes()
    except OSError as error:
        return Problem(str(path), "", Reason.MISSING, f"cannot be read: {error.strerror}")
    stated = re.search(r"[?&]md5=([0-9a-f]{32})", str(known.get("xml_url")))
    if options.check_md5 and stated and hashlib.md5(data, usedforsecurity=False).hexdigest() != stated[1]:
        return Problem(
            str(path), "", Reason.CHECKSUM, f"does not have the MD5 checksum {stated[1]} of {described.name}"
        )
    found = article_document(data, str(path), "", options, _known_metadata(known, number))
    if isinstance(found, Problem):
        return found
    license = pmc_license(known.get("license_code"), found.metadata.get("license"))
    return replace(found, metadata={**found.metadata, "license": license})


def _metadata_paths(folder: Path, options: Options) -> tuple[Path, ...]:
    file = f"{folder.name}.json"
    return folder / file, options.path / "metadata" / file, folder.parent / "metadata" / file


def _known_metadata(known: Mapping[str, Any], number: int) -> dict[str, Any]:
    doi = known.get("doi")
    return {
        "pmcid": f"PMC{number}",
        "pmid": str(known["pmid"]) if known.get("pmid") else None,
        "doi": str(doi).lower() if doi else None,
        "version": known.get("version"),
        "license_code": known.get("license_code"),
        "retracted": known.get("is_retracted") is True,
        "is_ocr": known.get("is_historical_ocr") is True,
        "manuscript": known.get("is_manuscript") is True,
    }


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = orjson.loads(path.read_bytes())
        columns = [column.strip() for column in manifest["fileSchema"].split(",")]
        if "Key" not in columns or manifest["fileFormat"] != "CSV" or not isinstance(manifest["files"], list):
            raise ValueError("it has no CSV files with a column Key")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the manifest.json of an inventory: {error!r}") from None
    return {**manifest, "columns": columns}


def _inventory_file(options: Options, key: str) -> Path | None:
    """Where a file of the inventory lies on this machine."""
    assert options.inventory is not None
    beside, name = options.inventory.parent, Path(key).name
    places = (beside / name, beside / "data" / name, beside.parent / "data" / name, options.path / key)
    return next((place for place in places if place.is_file()), None)


def _missing_articles(options: Options) -> Iterator[Problem]:
    """What the inventory lists and PATH lacks."""
    assert options.inventory is not None
    manifest = _manifest(options.inventory)
    here = np.sort(np.fromiter(map(_code, _article_folders(options.path)), np.int64))
    for entry in manifest["files"]:
        path = _inventory_file(options, entry["key"])
        if path is None:
            detail = f"its file {entry['key']} is not there"
            yield Problem(str(options.inventory), "", Reason.MISSING, detail, is_record=False)
            continue
        stated = str(entry.get("MD5checksum", "")).lower()
        if stated and (found := md5_file(path)) != stated:
            detail = f"MD5 checksum {found}, but the manifest says {stated}"
            yield Problem(str(path), "", Reason.CHECKSUM, detail, is_record=False)
            continue
        yield from _missing_in(path, manifest["columns"].index("Key"), here, options)


def _code(folder: Path) -> int:
    """Id and version in one number: a list of millions of folders takes little room so."""
    number, version = _numbers(folder)
    return number << 16 | version


def _is_in(ordered: Any, code: int) -> bool:
    place = int(np.searchsorted(ordered, code))
    return place < len(ordered) and int(ordered[place]) == code


def _missing_in(path: Path, column: int, here: Any, options: Options) -> Iterator[Problem]:
    line = 0
    try:
        with gzip.open(path) as stored, io.TextIOWrapper(stored, "utf-8", newline="") as lines:
            for line, row in enumerate(csv.reader(lines), start=1):
                match = _METADATA_KEY.search(unquote_plus(row[column]) if len(row) > column else "")
                if match and not _is_in(here, _code(Path(match[1]))):
                    where, detail = f"line {line}", f"{match[1]} is not in {options.path}"
                    yield Problem(str(path), where, Reason.MISSING, detail, is_record=False)
    except DAMAGED as error:
        where, detail = f"after line {line}", f"damaged or cut off ({error})"
        yield Problem(str(path), where, Reason.TRUNCATED, detail, is_record=False)
    except (UnicodeDecodeError, csv.Error) as error:
        yield Problem(str(path), f"after line {line}", Reason.BROKEN_FILE, str(error), is_record=False)
