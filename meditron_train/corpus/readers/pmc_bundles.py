"""PubMed Central's open access articles in tar bundles, as they were distributed until August 2026.

PATH is a .tar.gz or a directory of them; each is a shard. Articles are the members PMC<id>.xml, or *.nxml in a folder
PMC<id> (the packages of single articles). Retraction and license come from NAME.filelist.csv beside NAME.tar.gz where
it is there, and otherwise from the article. An article in a later bundle replaces the one in an earlier bundle: `scan`
lists the ids of each bundle (see `record_claims`). The archive is read as a stream.
"""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern
from typing import IO, Any

from meditron_train.corpus.articles import ArticleOptions, article_document, left_out
from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.licenses import pmc_license
from meditron_train.corpus.options import parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers
from meditron_train.corpus.records import file_shards
from meditron_train.files import DAMAGED, decompressed

_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_ARTICLE = re.compile(r"(?:^|/)PMC([0-9]{1,15})(?:\.xml|\.nxml|/[^/]+\.nxml)$")
_XML = (".xml", ".nxml")
_DAMAGED: tuple[type[Exception], ...] = (*DAMAGED, tarfile.TarError)
_UNREADABLE: tuple[type[Exception], ...] = (*_DAMAGED, OSError)


class Options(ArticleOptions):
    """Of the reader pmc_bundles."""


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each bundle."""
    return file_shards(parse_options(Options, options).path, _SUFFIXES)


def sidecars(shard: Shard, options: Mapping[str, Any]) -> Iterator[Path]:
    """Files beside those of the shard that are read with them, where they are there."""
    return map(_file_list_path, shard.paths)


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """The id of each article."""
    for member in _members(shard.paths[0]):
        if isinstance(member, _Member) and (match := _ARTICLE.search(member.name)):
            yield Claim(int(match[1]), member.position, revises=True)


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The articles of a bundle that no later one replaces."""
    settings, path = parse_options(Options, options), shard.paths[0]
    listed = _file_list(path)
    for member in _members(path):
        if isinstance(member, Problem):
            yield member
            continue
        name, match = member.name, _ARTICLE.search(member.name)
        if match is None:
            yield Problem(str(path), name, Reason.BROKEN_FILE, "the name says no PMC id")
        elif loss := losers.get(member.position):
            article = f"PMC{match[1]}"
            yield Problem(str(path), name, loss.reason, f"{article}: {loss}", article)
        elif member.num_bytes > settings.max_record_bytes:
            detail = f"{member.num_bytes} bytes; max_record_bytes is {settings.max_record_bytes}"
            yield Problem(str(path), name, Reason.TOO_LARGE, detail, f"PMC{match[1]}")
        else:
            try:
                data = member.read()
            except _DAMAGED as error:
                detail = f"damaged or cut off ({error})"
                yield Problem(str(path), name, Reason.TRUNCATED, detail, is_record=False)
                return
            found = _document(data, str(path), name, match[1], settings, listed.get(int(match[1])))
            yield replace(found, id=f"PMC{match[1]}") if isinstance(found, Problem) else found


@dataclass(frozen=True)
class _Member:
    """An XML file in a bundle; it can be read until the next one is asked for."""

    position: int
    name: str
    num_bytes: int
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        file = self.archive.extractfile(self.info)
        return file.read() if file is not None else b""


def _document(
    data: bytes, file: str, name: str, number: str, options: Options, listed: tuple[str, bool] | None
) -> Document | Problem:
    code, retracted = listed or (None, False)
    if dropped := left_out(file, name, options, retracted=retracted, is_ocr=False):
        return dropped
    known = {"pmcid": f"PMC{number}", "retracted": retracted, "license_code": code}
    found = article_document(data, file, name, options, known)
    if isinstance(found, Problem) or listed is None:
        return found
    license = pmc_license(code, found.metadata.get("license"))
    return replace(found, metadata={**found.metadata, "license": license})


def _members(path: Path) -> Iterator[_Member | Problem]:
    """The XML files; at the end a problem where the archive is damaged."""
    name = ""
    try:
        with (
            open(path, "rb") as stored,
            tarfile.open(fileobj=_uncompressed(stored, path), mode="r|") as archive,
        ):
            for position, info in enumerate(archive):
                name = info.name
                if info.isfile() and name.endswith(_XML):
                    yield _Member(position, name, info.size, archive, info)
                archive.members = []  # type: ignore[attr-defined]  # or it would keep them all
    except _UNREADABLE as error:
        reason = Reason.TRUNCATED if path.exists() else Reason.MISSING
        where, detail = f"after {name}" if name else "", f"damaged or cut off ({error})"
        yield Problem(str(path), where, reason, detail, is_record=False)


def _uncompressed(stored: IO[bytes], path: Path) -> IO[bytes]:
    return decompressed(stored, "" if path.suffix == ".tar" else ".gz")


def _file_list_path(path: Path) -> Path:
    stem = next(
        (path.name.removesuffix(suffix) for suffix in _SUFFIXES if path.name.endswith(suffix)), path.name
    )
    return path.with_name(f"{stem}.filelist.csv")


def _file_list(path: Path) -> dict[int, tuple[str, bool]]:
    """Id -> license code and whether it is retracted, of NAME.filelist.csv; empty without that file."""
    listing = _file_list_path(path)
    if not listing.is_file():
        return {}
    found = {}
    with open(listing, encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines):
            number = (row.get("AccessionID") or "").removeprefix("PMC")
            if number.isdecimal():
                retracted = (row.get("Retracted") or "").strip().lower() in ("yes", "y", "true")
                found[int(number)] = (intern((row.get("License") or "").strip()), retracted)
    return found
