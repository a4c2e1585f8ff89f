"""Sphinx: the documentation as a site. `make docs` builds it into build/docs and treats warnings as errors."""

from __future__ import annotations

from meditron_train import __version__

project = "meditron-train"
author = "the meditron-train developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["generate.py"]

html_theme = "furo"
html_title = f"meditron-train {version}"
html_static_path: list[str] = []
html_theme_options = {
    "source_repository": "",
    "footer_icons": [],
}
html_show_sourcelink = True
# No request leaves the page: it works from a disk and behind a firewall.
html_css_files: list[str] = []
