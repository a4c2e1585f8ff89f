"""MEDLINE/PubMed citations: the yearly baseline and its update files, in the order of their names.

A shard is a file, *.xml or *.xml.gz, checked against NAME.md5 where that is there. A later file overrides an earlier
one, DeleteCitation removes what earlier files said, and of several versions of a PMID the highest stays. All of this is
decided beforehand: `scan` lists the PMIDs of each file, `record_claims` says which records lose, and `read` leaves
those out, so that files are read in any order. Within a file records are numbered as they stand; DeleteCitation is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meditron_train.corpus.checksums import checksum_path, checksum_problem
from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.options import NoInputError, ReaderOptions, existing, parse_options
from meditron_train.corpus.record_claims import NO_LOSERS, Claim, Losers
from meditron_train.corpus.safe_xml import XmlProblem, stream_elements
from meditron_train.corpus.text.medline import citation, parse_pmid, pmid_and_version
from meditron_train.corpus.text.rules import Removed
from meditron_train.errors import UserError
from meditron_train.files import DAMAGED, decompressed

_SUFFIXES = (".xml", ".xml.gz")
_TAGS = ("PubmedArticle", "PubmedBookArticle", "DeleteCitation", "DeleteDocument")


class Options(ReaderOptions):
    """Of the reader medline."""

    require_abstract: bool = True
    """Leave out citations that are only a title."""
    keep_retracted: bool = False
    check_md5: bool = True


def shards(options: Mapping[str, Any]) -> list[Shard]:
    """One for each file, in the order of the files' names (not of their folders).

    Raises:
        NoInputError: there are no files.
        UserError: two files have the same name.
    """
    path = existing(parse_options(Options, options).path)
    files = (
        [path] if path.is_file() else [file for file in path.rglob("*.xml*") if file.name.endswith(_SUFFIXES)]
    )
    found = [Shard(file.name, (file,)) for file in sorted(files, key=lambda file: (file.name, str(file)))]
    if not found:
        raise NoInputError(f"there is no file *.xml or *.xml.gz in {path}")
    for shard, following in zip(found[:-1], found[1:], strict=True):
        if shard.name == following.name:
            raise UserError(f"{shard.paths[0]} and {following.paths[0]} are the same file; remove one")
    return found


def sidecars(shard: Shard, options: Mapping[str, Any]) -> Iterator[Path]:
    """Files beside those of the shard that are read with them, where they are there."""
    return (checksum_path(path) for path in shard.paths)


def scan(shard: Shard, options: Mapping[str, Any]) -> Iterator[Claim]:
    """The PMIDs that the records of a file give a text or delete."""
    for position, element in _records(shard.paths[0], parse_options(Options, options)):
        if isinstance(element, Problem):
            continue
        if element.tag.startswith("Delete"):
            for child in element.iterchildren("PMID"):
                if number := parse_pmid(child):
                    yield Claim(number[0], position, number[1], deletes=True)
        elif number := pmid_and_version(element):
            yield Claim(number[0], position, number[1], revises=True)


def read(
    shard: Shard, options: Mapping[str, Any], losers: Losers = NO_LOSERS
) -> Iterator[Document | Problem]:
    """The citations of a file that no other record overrides or deletes."""
    settings, file = parse_options(Options, options), str(shard.paths[0])
    for position, element in _records(shard.paths[0], settings):
        if isinstance(element, Problem):
            yield element
        elif not element.tag.startswith("Delete"):
            yield _document(element, position, file, settings, losers)


def _document(element: Any, position: int, file: str, options: Options, losers: Losers) -> Document | Problem:
    def problem(reason: Reason, detail: str) -> Problem:
        return Problem(file, f"record {position} (line {element.sourceline})", reason, detail, name)

    name = ""
    number = pmid_and_version(element)
    if number is None:
        return problem(Reason.BROKEN_FILE, "the record has no PMID")
    name = f"PMID:{number[0]}"
    if loss := losers.get(position):
        return problem(loss.reason, f"{name}: {loss}")
    removed = Removed()
    text, has_abstract, metadata = citation(element, options.text, removed)
    if metadata.get("retracted") and not options.keep_retracted:
        return problem(Reason.RETRACTED, f"{name} has been retracted")
    if not text or (options.require_abstract and not has_abstract):
        return problem(Reason.EMPTY, f"{name} has no abstract")
    return Document(name, text, metadata, removed)


def _records(path: Path, options: Options) -> Iterator[tuple[int, Any]]:
    """Position and element of each record, and at the end a Problem where the file cannot be read further."""
    position = -1
    if options.check_md5 and (problem := checksum_problem(path)):
        yield 0, problem
        return
    try:
        with open(path, "rb") as stored:
            elements = stream_elements(decompressed(stored, path.suffix), _TAGS, options.max_record_bytes)
            for position, element in enumerate(elements):
                yield position, element
        return
    except XmlProblem as error:
        reason, detail = error.reason, error.detail
        where = f"record {position + 1}, line {error.line}" if error.line else f"record {position + 1}"
    except DAMAGED as error:
        reason, detail, where = Reason.TRUNCATED, f"damaged or cut off ({error})", f"after record {position}"
    except OSError as error:
        reason, detail, where = Reason.MISSING, f"cannot be read: {error.strerror or error}", ""
    yield position + 1, Problem(str(path), where, reason, detail, is_record=False)
