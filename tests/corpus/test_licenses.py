"""Licenses as articles state them."""

from __future__ import annotations

import pytest

from meditron_train.corpus.licenses import pmc_license, spdx_of_url


@pytest.mark.parametrize(
    ("url", "identifier"),
    [
        ("https://creativecommons.org/licenses/by/4.0/", "CC-BY-4.0"),
        ("http://creativecommons.org/licenses/by-nc-nd/4.0", "CC-BY-NC-ND-4.0"),
        ("https://creativecommons.org/licenses/by/4.0/legalcode", "CC-BY-4.0"),
        ("https://creativecommons.org/licenses/by/4.0/deed.en", "CC-BY-4.0"),
        ("https://creativecommons.org/licenses/by-sa/4.0/legalcode.de", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/licenses/by-nc-sa/3.0/igo/", "CC-BY-NC-SA-3.0-IGO"),
        ("http://creativecommons.org/licenses/by/3.0/igo/legalcode", "CC-BY-3.0-IGO"),
        ("http://creativecommons.org/licenses/by/3.0/IGO", "CC-BY-3.0-IGO"),
        ("http://creativecommons.org/licenses/by/3.0/us/", "CC-BY-3.0-US"),
        ("http://creativecommons.org/licenses/by-nc/3.0/es/deed.es", None),  # SPDX has no such port
        ("http://creativecommons.org/licenses/by-nc/3.0/igo/", None),
        ("https://example.org/terms", None),
    ],
)
def test_creative_commons(url: str, identifier: str | None) -> None:
    assert spdx_of_url(url) == identifier


def test_an_article_knows_more_than_pmc() -> None:
    assert pmc_license("CC BY", "CC-BY-4.0") == "CC-BY-4.0"
    assert pmc_license("CC BY-NC-SA", "CC-BY-NC-SA-3.0-IGO") == "CC-BY-NC-SA-3.0-IGO"
    assert pmc_license("CC BY", "CC-BY-NC-4.0") == "LicenseRef-PMC-CC-BY"
    assert pmc_license("CC BY", None) == "LicenseRef-PMC-CC-BY"
    assert pmc_license(None, "CC-BY-4.0") == "LicenseRef-PMC-none"
