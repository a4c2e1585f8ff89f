"""What a license demands of those who pass on weights made from a model under it.

Sources: the license texts at the addresses below. Only the sentences that must accompany the weights are repeated here;
a copy of the whole text comes from the base's directory or from the user.
"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path

from meditron_train.errors import UserError

NOTICE_NAME, LICENSE_NAME, CODE_LICENSE_NAME = "NOTICE", "LICENSE", "LICENSE-CODE"
_APACHE = Path(__file__).with_name("apache-2.0.txt")
_TEXT_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_POLICY_NAMES = ("USE_POLICY.md",)


@dataclass(frozen=True)
class License:
    """A license of weights.

    Attributes:
        hub_id: as a model card's `license` spells it.
        attribution: must lie beside the weights, word for word.
        needs_text: whether a copy of the license must go with the weights.
        name_prefix: how the model's name must begin.
        sentence: to be shown with the model.
    """

    hub_id: str
    title: str
    url: str
    attribution: str = ""
    needs_text: bool = True
    name_prefix: str = ""
    sentence: str = ""


def _llama(version: str, owner: str = "Llama", sentence: str = "Built with Llama") -> License:
    name = f"{owner} {version}"
    return License(
        f"llama{version}",
        f"{name} Community License Agreement",
        f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        name_prefix="Llama 3" if version == "3" else "Llama",
        sentence=sentence,
    )


_KNOWN = {
    known.hub_id: known
    for known in (
        License(
            "llama2",
            "LLAMA 2 Community License Agreement",
            "https://ai.meta.com/llama/license/",
            "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
            "Reserved.",
        ),
        _llama("3", "Meta Llama", "Built with Meta Llama 3"),
        _llama("3.1"),
        _llama("3.2"),
        _llama("3.3"),
        License("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
        License("mit", "MIT License", "https://opensource.org/license/mit"),
        License(
            "cc0-1.0",
            "Creative Commons Zero 1.0",
            "https://creativecommons.org/publicdomain/zero/1.0/",
            needs_text=False,
        ),
    )
}


@dataclass(frozen=True)
class LicenseFiles:
    """What lies beside the weights for the license's sake.

    Attributes:
        license: of the weights.
        text: the file with its words, None where there is none.
        policies: files that belong to it.
        is_known: whether what it demands is known here.
    """

    license: License
    text: Path | None
    policies: tuple[Path, ...] = ()
    is_known: bool = True

    def write(self, directory: Path, model_name: str, made_from: str) -> None:
        """LICENSE, the base's policies, NOTICE, and the license of code and examples."""
        if self.text is not None:
            shutil.copyfile(self.text, directory / LICENSE_NAME)
        for policy in self.policies:
            shutil.copyfile(policy, directory / policy.name)
        shutil.copyfile(_APACHE, directory / CODE_LICENSE_NAME)
        lines = [
            model_name,
            "",
            f"The weights were made from {made_from} and are under its license, the {self.license.title}:",
            self.license.url or f"see {LICENSE_NAME}",
            *([self.license.sentence] if self.license.sentence else []),
            *(["", self.license.attribution] if self.license.attribution else []),
            "",
            f"Code and examples in the model card are under the Apache License 2.0 ({CODE_LICENSE_NAME}).",
        ]
        (directory / NOTICE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def find_license(
    stated: str | None, text: Path | None, base: Path | None, model_name: str, *, is_uploaded: bool = False
) -> tuple[LicenseFiles, list[str]]:
    """The files that go with weights made from a base under the license `stated`, and what remains to be done by hand.

    Args:
        text: a file with the license's words; else that of the directory `base` is taken.
        is_uploaded: the weights leave this machine, so that nothing can be added by hand before.

    Raises:
        UserError: no license is stated, one that is not known here, or must go with an upload, comes without its text,
            or it demands another name of the model.
    """
    if not stated:
        raise UserError(
            "the license of the base model is not stated, and the weights follow it: give --base-license (llama2, "
            "apache-2.0, ...) or model.license in the run's configuration. For a model from random weights, it is the "
            "license that you choose"
        )
    known = _KNOWN.get(stated.lower())
    if text is not None and not text.is_file():
        raise UserError(f"--license-file {text} is not a file")
    found = text or _first(base, _TEXT_NAMES)
    if known is None:
        if text is None:
            near = difflib.get_close_matches(stated.lower(), _KNOWN, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"what the license {stated!r} demands is not known here{hint}: known are {', '.join(_KNOWN)}. For "
                "another one, give its text with --license-file"
            )
        return LicenseFiles(License("other", stated, ""), text, is_known=False), []
    if known.hub_id == "apache-2.0" and found is None:
        found = _APACHE
    if known.name_prefix and not model_name.replace("-", " ").startswith(known.name_prefix):
        raise UserError(
            f"the {known.title} wants names of models made from it to begin with {known.name_prefix!r}; this one is "
            f"{model_name}: give --repo or OUT_DIR such a name"
        )
    to_do = []
    if known.needs_text and found is None:
        missing = f"the {known.title} must go with the weights, and no copy was found beside the base"
        if is_uploaded:
            raise UserError(f"{missing}: before an upload, give it with --license-file FILE ({known.url})")
        to_do.append(f"{missing}: add it as {LICENSE_NAME} with --license-file FILE ({known.url})")
    policies = tuple(path for name in _POLICY_NAMES if (path := _first(base, (name,))) is not None)
    return LicenseFiles(known, found, policies), to_do


def _first(directory: Path | None, names: tuple[str, ...]) -> Path | None:
    if directory is None:
        return None
    return next((directory / name for name in names if (directory / name).is_file()), None)
