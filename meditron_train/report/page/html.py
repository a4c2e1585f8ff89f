"""A page as one HTML file that asks nobody for anything: styles, scripts and numbers are in it.

jinja2 escapes every text; plotly's script comes from the Python package, which is not needed for anything else.
"""

from __future__ import annotations

import json
from pathlib import Path

from meditron_train.errors import UserError
from meditron_train.report.page import blocks
from meditron_train.report.page.blocks import Chart, Page

_HERE = Path(__file__).parent
# No request can leave the page, whatever stands in it.
_POLICY = (
    "default-src 'none'; script-src {scripts}'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_TESTS = {
    "text": blocks.Text,
    "facts": blocks.Facts,
    "table": blocks.Table,
    "preformatted": blocks.Preformatted,
    "layout": blocks.LayoutDrawing,
    "chart": blocks.Chart,
}


def render_html(page: Page, *, plotly_address: str | None = None) -> str:
    """The page.

    Args:
        plotly_address: where plotly's script is served; None: in the page.

    Raises:
        UserError: plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise not_installed() from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, kind in _TESTS.items():
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    own = {
        name: markupsafe.Markup((_HERE / f"page.{name}").read_text(encoding="utf-8"))
        for name in ("css", "js")
    }
    return environment.get_template("page.html").render(
        page=page,
        policy=_POLICY.format(scripts="'self' " if plotly_address else ""),
        charts_json=markupsafe.Markup(_json_for_script(page.charts)),
        plotly_address=plotly_address,
        plotly_js="" if plotly_address else markupsafe.Markup(plotly_script()),
        **own,
    )


def plotly_script() -> str:
    """plotly.js as the installed package has it.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise not_installed() from None
    return str(get_plotlyjs())


def not_installed() -> UserError:
    """What to do without the packages that a page needs."""
    return UserError(
        "a report in HTML needs plotly and jinja2: pip install 'meditron-train[report]'. Markdown needs neither: "
        "--output report.md"
    )


def _json_for_script(charts: list[Chart]) -> str:
    """JSON that cannot end the script element it stands in."""
    values = [{"name": chart.name, "traces": chart.traces, "layout": chart.layout} for chart in charts]
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
