from __future__ import annotations

import sys

import pytest

from meditron_train.errors import UserError
from meditron_train.report.page.blocks import Cell, Page, Preformatted, Section, Text, facts, table
from meditron_train.report.page.html import render_html
from meditron_train.report.page.markdown import render_markdown

EVIL = "</script><script>window.hit=1</script><img src=x onerror=hit=1> `x` | [a](javascript:b) **b** &lt;"


def page(text: str) -> Page:
    blocks = (
        Text(text), facts([(text, text, text)]), table((text, "b"), [(text, Cell(text, "bad"))], caption=text),
        Preformatted(text, text),
    )  # fmt: skip
    return Page(text, Cell(text), text, facts([(text, text, text)]), (Section("one", text, blocks),), text)


def test_text_never_becomes_html():
    html = render_html(page(EVIL), plotly_address="/plotly.js")
    assert html.count("<script") == 3  # the numbers, plotly, the page's own
    assert "<img" not in html and "&lt;/script&gt;&lt;script&gt;" in html


def test_text_never_becomes_markdown():
    markdown = render_markdown(page(EVIL))
    outside = markdown.split("```text")[0]
    assert "<script" not in outside and "<img" not in outside
    assert r"\[a\](javascript:b)" in outside and r"\*\*b\*\*" in outside and r"\|" in outside


def test_a_fence_in_a_text_does_not_end_its_block():
    markdown = render_markdown(page("a\n```\n# b\n````\nc"))
    assert "`````text\na\n```\n# b\n````\nc\n`````\n" in markdown


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named_with_the_command(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.offline", None)
    with pytest.raises(UserError, match=r"pip install 'meditron-train\[report\]'"):
        render_html(page("a"))
    assert "a" in render_markdown(page("a"))
