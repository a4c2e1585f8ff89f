"""Which licenses are known."""

from __future__ import annotations

from meditron_train.corpus.declaration import Corpus
from meditron_train.corpus.licenses import PORTED, S2ORC_KNOWN

# SPDX identifiers of what medical and general text comes under.
SPDX = frozenset(
    [
        f"CC-{terms}-{v}"
        for terms in ("BY", "BY-SA", "BY-ND", "BY-NC", "BY-NC-SA", "BY-NC-ND")
        for v in "1.0 2.0 2.5 3.0 4.0".split()
    ]
    + "CC0-1.0 CC-PDDC PDDL-1.0 ODC-By-1.0 ODbL-1.0 OGL-UK-3.0 MIT Apache-2.0".split()
    + "BSD-2-Clause BSD-3-Clause GFDL-1.3-or-later".split()
).union(PORTED)
# PubMed Central's codes name no version, so that they are not SPDX identifiers.
_PMC = frozenset(
    f"LicenseRef-PMC-{code}"
    for code in "CC-BY CC-BY-SA CC-BY-ND CC-BY-NC CC-BY-NC-SA CC-BY-NC-ND CC0 TDM".split()
)


def accepted_licenses(corpus: Corpus) -> frozenset[str]:
    """What a document may state without being reported."""
    return (
        SPDX | _PMC | S2ORC_KNOWN | set(corpus.licenses.known) | {source.license for source in corpus.sources}
    )
