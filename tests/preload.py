"""What the fork server of the tests imports once, for ranks and for commands.

Frozen: no garbage collection of a rank goes through the million objects of these modules again. megatron-core asks for
one at each save, and each would copy the pages that the ranks share.

A tokenizer that one of these processes has read is remembered for the others of this test session: each would start a
process of its own that imports transformers, which takes longer than most of these runs. `tests/tokenizer` reads for
real.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict
from pathlib import Path

import meditron_train.cli.main
import meditron_train.train.engine
import meditron_train.train.start  # noqa: F401
from meditron_train.files import replace_text
from meditron_train.tokenizer import reading
from meditron_train.tokenizer.files import content_digest

_readings = Path(os.environ["MEDITRON_TEST_READINGS"])
_read_for_real = reading._read_in_child


def _read_once(directory: Path, named: Path) -> reading.Reading:
    remembered = _readings / f"{content_digest(directory)}.json"
    if not remembered.exists():
        read = _read_for_real(directory, named)
        replace_text(remembered, json.dumps(asdict(read)), durable=False)
    return reading.Reading(**json.loads(remembered.read_text(encoding="utf-8")))


reading._read_in_child = _read_once
gc.collect()
gc.freeze()
