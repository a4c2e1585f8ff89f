"""A page as a file, in the format that its name asks for."""

from __future__ import annotations

from pathlib import Path

from meditron_train.errors import UserError
from meditron_train.files import replace_text
from meditron_train.report.page.blocks import Page
from meditron_train.report.page.html import render_html
from meditron_train.report.page.markdown import render_markdown

_WRITERS = {".html": render_html, ".md": render_markdown}


def write_page(page: Page, path: Path) -> None:
    """Write the page atomically.

    Raises:
        UserError: the name ends in neither .html nor .md, or a package for HTML is missing.
    """
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise UserError(f"--output {path}: write a name that ends in .html or .md")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, writer(page), durable=False, shared=True)
