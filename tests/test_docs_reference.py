"""The reference pages made from the code are those of this code, and the site is built without a warning."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_generated_pages_are_up_to_date():
    for name, content in runpy.run_path(str(DOCS / "generate.py"))["pages"]().items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == content, (
            f"docs/reference/{name} is older than the code: python docs/generate.py"
        )


@pytest.mark.long
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Troubleshooting" in page and (tmp_path / "reference/configuration.html").exists()
