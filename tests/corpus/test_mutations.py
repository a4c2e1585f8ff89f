"""Whatever happens to a record, it becomes a document or a problem: true files with random changes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from lxml import etree

from meditron_train.corpus.articles import ArticleOptions, article_document
from meditron_train.corpus.document import Document, Problem, Reason, Shard
from meditron_train.corpus.readers import guidelines, medline, s2orc
from tests.corpus.readers.test_jsonl import GUIDELINE
from tests.corpus.readers.test_s2orc import paper
from tests.corpus.reading import FIXTURES

NUM_MUTATIONS = 150
VALUES = (
    None,
    -1,
    10**30,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    1.5,
    True,
    "5",
    '{"a": 1}',
    "[3]",
    '[{"start": 0, "end": 1}]',
)


def mutated_xml(source: bytes, random: Random) -> bytes:
    """The document with elements removed, renamed, emptied, and attributes changed."""
    root = etree.fromstring(source)
    elements = [element for element in root.iter() if isinstance(element.tag, str)]
    for _ in range(random.randint(1, 6)):
        element, draw = random.choice(elements), random.random()
        parent = element.getparent()
        if draw < 0.4 and parent is not None:
            parent.remove(element)
        elif draw < 0.6:
            element.tag = random.choice(elements).tag
        elif draw < 0.8:
            for name in element.attrib:
                element.set(name, random.choice(["", "x", "-1", "9" * 30, "²", "F1"]))
        else:
            element.text = random.choice([None, "", "  ", "²٣", "9" * 30])
    return etree.tostring(root)


def mutated_json(value: Any, random: Random) -> Any:
    if not isinstance(value, dict):
        return value
    changed = {key: mutated_json(inner, random) for key, inner in value.items()}
    if changed and random.random() < 0.3:
        changed[random.choice(list(changed))] = random.choice(VALUES)
    return changed


def read_file(reader: Any, path: Path, options: dict[str, Any]) -> None:
    """All of a file; every item must be a document or a problem, and every claim fit the index."""
    shard, given = Shard(path.name, (path,)), {"path": str(path), **options}
    for claim in reader.scan(shard, given):
        assert isinstance(claim.key, str) or 0 <= claim.key < 2**64
        assert 0 <= claim.version < 2**32
    for item in reader.read(shard, given):
        assert isinstance(item, (Document, Problem))
        if isinstance(item, Document):
            json.dumps(dict(item.metadata))


def test_articles():
    random, options = Random(1), ArticleOptions(path=Path())
    sources = [
        path.read_bytes() for path in sorted(FIXTURES.glob("pmc/*/*.xml")) if path.stem != "PMC900005.1"
    ]
    for _ in range(NUM_MUTATIONS):
        data = mutated_xml(random.choice(sources), random)
        found = article_document(data, "file", "", options, {"pmcid": "PMC1"})
        assert isinstance(found, (Document, Problem))


def test_citations(tmp_path):
    random, file = Random(2), tmp_path / "a.xml"
    sources = [path.read_bytes() for path in sorted(FIXTURES.glob("medline/*/*.xml"))]
    for number in range(NUM_MUTATIONS):
        file.write_bytes(mutated_xml(random.choice(sources), random))
        more = number % 2 == 0
        read_file(medline, file, {"require_abstract": more, "text": {"other_languages": more}})


def test_json(tmp_path):
    random, file = Random(3), tmp_path / "a.jsonl"
    for _ in range(NUM_MUTATIONS):
        for reader, record in ((s2orc, paper()), (guidelines, GUIDELINE)):
            file.write_text(json.dumps(mutated_json(record, random)))
            read_file(reader, file, {})


def test_deep_nesting_is_a_problem_and_not_a_crash():
    deep = '<xref ref-type="fig">' * 240 + "x" + "</xref>" * 240
    data = f"<article><body><p>{deep}</p></body></article>".encode()
    found = article_document(data, "file", "", ArticleOptions(path=Path()), {"pmcid": "PMC1"})
    assert isinstance(found, Problem)
    assert found.reason is Reason.FORBIDDEN_XML
