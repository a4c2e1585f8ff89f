"""What the fork server of the tests imports once, for ranks and for commands.

Frozen: no garbage collection of a rank goes through the million objects of these modules again. megatron-core asks for
one at each save, and each would copy the pages that the ranks share.

A tokenizer that one of these processes has read is remembered for the others of this test session: each would start a
process of its own that imports transformers, which takes longer than most of these runs. `tests/tokenizer` reads for
real.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import meditron_train.cli.main
import meditron_train.train.engine
import meditron_train.train.start  # noqa: F401
from meditron_train.files import replace_text
from meditron_train.tokenizer import bounded
from meditron_train.tokenizer.files import content_digest

_answers = Path(os.environ["MEDITRON_TEST_READINGS"])
_ask_for_real = bounded._in_child


def _ask_once(task: str, directory: Path, named: Path, arguments: dict[str, str]) -> Any:
    question = f"{task} {content_digest(directory)} {json.dumps(arguments)}"
    remembered = _answers / f"{hashlib.sha256(question.encode()).hexdigest()}.json"
    if not remembered.exists():
        answer = _ask_for_real(task, directory, named, arguments)
        replace_text(remembered, json.dumps(answer), durable=False)
    return json.loads(remembered.read_text(encoding="utf-8"))


bounded._in_child = _ask_once
gc.collect()
gc.freeze()
