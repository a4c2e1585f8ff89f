"""Licenses as documents state them, as SPDX identifiers where they are exact."""

from __future__ import annotations

import re

_CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licenses|publicdomain)/(by(?:-nc)?(?:-sa|-nd)?|zero|mark)/(\d\.\d)"
    r"(?:/([a-z]+)(?![a-z.]))?",
    re.I,
)
_TEXTS = ("legalcode", "deed")  # of a license, not ports to a jurisdiction
PORTED = frozenset(
    f"CC-{name}"
    for name in (
        *("BY-2.5-AU", "BY-3.0-AT", "BY-3.0-AU", "BY-3.0-DE", "BY-3.0-IGO", "BY-3.0-NL", "BY-3.0-US"),
        *("BY-NC-3.0-DE", "BY-NC-ND-3.0-DE", "BY-NC-ND-3.0-IGO", "BY-NC-SA-2.0-DE", "BY-NC-SA-2.0-FR"),
        *("BY-NC-SA-2.0-UK", "BY-NC-SA-3.0-DE", "BY-NC-SA-3.0-IGO", "BY-ND-3.0-DE", "BY-SA-2.0-UK"),
        *("BY-SA-2.1-JP", "BY-SA-3.0-AT", "BY-SA-3.0-DE", "BY-SA-3.0-IGO"),
    )
)
"""The ports of Creative Commons licenses, to a jurisdiction or for intergovernmental organizations, that SPDX has."""


def spdx_of_url(url: str) -> str | None:
    """CC-BY-4.0 from the address of a Creative Commons license, CC-BY-3.0-IGO from that of a port; None for any other,
    and for a port that has no identifier."""
    match = _CREATIVE_COMMONS.search(url)
    if match is None:
        return None
    kind, version, port = match[1].lower(), match[2], (match[3] or "").lower()
    if kind in ("zero", "mark"):
        return f"CC0-{version}" if kind == "zero" else None
    name = f"CC-{kind.upper()}-{version}"
    if not port or port in _TEXTS:
        return name
    ported = f"{name}-{port.upper()}"
    return ported if ported in PORTED else None


def pmc_license(code: str | None, stated: str | None) -> str:
    """The license of an article of PMC.

    Args:
        code: PMC's own, as "CC BY-NC"; None where it has none.
        stated: the SPDX identifier of the article itself, which knows the version; None where it states none.

    Returns:
        the SPDX identifier if the two agree, or else PMC's code as LicenseRef-PMC-CC-BY-NC; LicenseRef-PMC-none.
    """
    if not code:
        return "LicenseRef-PMC-none"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", code.strip()).strip("-").upper()
    if stated is not None and re.sub(r"-\d\.\d(-[A-Z]+)?$", "", stated) == name:
        return stated
    return f"LicenseRef-PMC-{name}"


_S2ORC_TERMS = {
    "CC" + terms.replace("-", ""): f"CC-{terms}"
    for terms in ("BY", "BY-SA", "BY-ND", "BY-NC", "BY-NC-SA", "BY-NC-ND")
}
S2ORC_KNOWN = frozenset(f"LicenseRef-S2ORC-{terms}" for terms in (*_S2ORC_TERMS.values(), "CC0"))
"""Of what `s2orc_license` returns, the licenses with known terms."""


def s2orc_license(code: str) -> str:
    """The license of a paper of S2ORC by the code in its oainfo: "CCBYNC" is LicenseRef-S2ORC-CC-BY-NC.

    The codes name no version, so that they are not SPDX identifiers.
    """
    name = re.sub(r"[^A-Z0-9]", "", code.upper())
    other = re.sub(r"[^A-Za-z0-9.]+", "-", code.strip()).strip("-") or "none"
    return f"LicenseRef-S2ORC-{'CC0' if name == 'CC0' else _S2ORC_TERMS.get(name, other)}"
