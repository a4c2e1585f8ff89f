"""Where transformers 4.x and 5.x would not read a tokenizer directory alike."""

from __future__ import annotations

import json
from pathlib import Path

from meditron_train.errors import UserError
from meditron_train.tokenizer.bounded import ask
from meditron_train.tokenizer.files import JSON, MODEL, tokenizer_config, tokenizer_files
from meditron_train.tokenizer.reading import Reading

_ONLY_5X = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def version_notes(directory: Path, reading: Reading) -> list[str]:
    """One sentence for each way in which the other major version of transformers reads the files otherwise, or not.

    Found without that version: 4.x takes tokenizer.json's way to split text as it stands, 5.x rebuilds it for some
    classes, and the two versions write tokenizer_config.json differently.
    """
    names, config = tokenizer_files(directory), tokenizer_config(directory)
    is_5x = not reading.transformers.startswith("4.")
    notes = []
    if config.get("tokenizer_class") in _ONLY_5X:
        notes.append(f"transformers 4.x does not know its tokenizer_class {config['tokenizer_class']}")
    if isinstance(config.get("extra_special_tokens"), list):
        notes.append(
            "transformers 4.x cannot read its tokenizer_config.json, which 5.x saved (extra_special_tokens)"
        )
    if MODEL in names and JSON not in names:
        notes.append(
            "transformers 4.x and 5.x make different ids from tokenizer.model without tokenizer.json: leading spaces, "
            f"and BOS unless add_bos_token is stated. Here it means what {reading.transformers} makes of it"
        )
    elif is_5x and JSON in names and reading.backend and _differs(directory, reading):
        notes.append(
            f"transformers 4.x takes tokenizer.json as it stands, but {reading.transformers} makes other ids of some "
            f"texts with the class {reading.kind}. Here it means what {reading.transformers} makes of it"
        )
    return notes


def _differs(directory: Path, reading: Reading) -> bool:
    """Whether tokenizer.json as it stands gives other ids than the reading, on probe texts."""
    assert reading.backend is not None
    try:
        texts = json.dumps(list(reading.ids))
        return bool(ask("differs", directory, backend=reading.backend, texts=texts))
    except UserError:  # as it stands it is no tokenizer, or one that never comes to an end
        return True
