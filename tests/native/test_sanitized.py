"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import platform
import shutil

import pytest

from tests.native import sanitized

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the list of kernels is that of x86-64"),
]


def test_attention_stays_inside_its_tensors(tmp_path):
    sources = sorted((sanitized.ROOT / "csrc/attention/cpu").glob("*.cpp"))
    assert "right" in sanitized.run("test_attention", sources, tmp_path)
