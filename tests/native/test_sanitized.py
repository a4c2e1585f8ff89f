"""The C++ core under AddressSanitizer, UBSan and ThreadSanitizer, with inputs damaged at random."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from tests.native.sanitized import CPP, ROOT, run_sanitized

pytestmark = pytest.mark.long  # compilers and fuzzing

PACKING = ROOT / "csrc" / "packing"
SOURCES = [path for path in sorted(PACKING.glob("*.cpp")) if path.name != "bindings.cpp"]


def test_packing_on_random_inputs(tmp_path: Path) -> None:
    sources = [CPP / "test_packing.cpp", PACKING / "best_fit.cpp", PACKING / "order.cpp"]
    assert run_sanitized(sources, tmp_path, include=[PACKING]) == "ok\n"


def test_damaged_indexes_are_refused_or_stay_inside(tmp_path: Path) -> None:
    output = run_sanitized(
        [CPP / "fuzz_index.cpp", *SOURCES], tmp_path, include=[PACKING], arguments=["20000"]
    )
    counts = dict(re.findall(r"(\w+) (\d+)", output))
    assert all(int(counts[name]) > 1000 for name in ("opened", "refused", "gathered", "refused_samples")), (
        output
    )


def test_prefetcher(tmp_path: Path) -> None:
    assert run_sanitized([CPP / "test_prefetch.cpp", *SOURCES], tmp_path, include=[PACKING]) == "ok\n"


def test_prefetcher_has_no_races(tmp_path: Path) -> None:
    output = run_sanitized(
        [CPP / "test_prefetch.cpp", *SOURCES],
        tmp_path,
        include=[PACKING],
        sanitizers="thread",
        arguments=["without-forks"],
    )
    assert output == "ok\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the list of kernels is that of x86-64")
def test_attention_stays_inside_its_tensors(tmp_path: Path) -> None:
    sources = [CPP / "test_attention.cpp", *sorted((ROOT / "csrc/attention/cpu").glob("*.cpp"))]
    assert "right" in run_sanitized(sources, tmp_path, include=[ROOT / "csrc"])
