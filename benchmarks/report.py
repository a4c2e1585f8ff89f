"""How fast the report of a long run is made, and how fast a browser opens it: `python -m benchmarks.report`.

The run is synthetic: 100,000 logged steps, 128 ranks, three sources. The browser is headless Chromium, if there is one
(`make browser`); the times are its own: from the start of the navigation until the first content is painted, until the
page is loaded, and until every chart is drawn.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import browser
from tests.report.synthetic_run import write_run

_NUM_STEPS = 100_000
_NUM_ROUNDS = 5
_MOMENTS = """
() => {
  const navigation = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return { painted: paint.startTime, loaded: navigation.loadEventEnd };
}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = write_run(
            Path(directory) / "run", num_steps=_NUM_STEPS, tensor=8, pipeline=8, world_size=128,
            restarts_at=(20_000, 60_000),
        )  # fmt: skip
        size = (run / "metrics.jsonl").stat().st_size / 1e6
        print(f"metrics.jsonl of {_NUM_STEPS:,} steps: {size:.0f} MB")
        seconds = [_build(run) for _ in range(_NUM_ROUNDS)]
        page = run / "report.html"
        print(f"made in {min(seconds):.1f} s (best of {_NUM_ROUNDS}); {page.stat().st_size / 1e6:.1f} MB")
        if reason := browser.why_not():
            print(f"not opened: {reason}")
            return
        _open(page)


def _build(run: Path) -> float:
    """Seconds of the whole command, the interpreter's start included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "meditron_train", "report", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _open(page: Path) -> None:
    found: list[dict[str, float]] = []
    with browser.browser() as running:
        for _ in range(_NUM_ROUNDS):
            with browser.opened(running, page.as_uri()) as opened:
                opened.wait_for_charts()
                drawn = opened.page.evaluate("() => Number(document.documentElement.dataset.drawnMs)")
                found.append({**opened.page.evaluate(_MOMENTS), "all charts drawn": drawn})
    for name in found[0]:
        times = [moments[name] / 1000 for moments in found]
        print(f"{name}: {min(times):.2f} s at best, {statistics.median(times):.2f} s in the median")


if __name__ == "__main__":
    main()
