from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.report.json_lines import read_json_lines
from meditron_train.report.metrics import METRICS_NAME


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of RUN_DIR/metrics.jsonl, by ascending step; [] without the file. A torn last line is ignored."""
    return read_json_lines(Path(run_dir) / METRICS_NAME)
