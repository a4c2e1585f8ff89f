"""`meditron-train report`: a run explains itself, in one file or on a page that is kept up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meditron_train.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.", metavar="RUN_DIR...")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="FILE.html or FILE.md (default: report.html in the run directory)."),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", metavar="FILE.json", help="A result of `evaluate --output` to show, too."
        ),
    ] = None,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Read all checkpoints and compare their SHA-256.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page while the run goes on.")] = False,
    host: Annotated[
        str, typer.Option("--host", help="With --serve: the address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="With --serve: the port.")] = 8642,
) -> None:
    """All that a run has recorded as one HTML file that works anywhere, or as Markdown.

    With several runs: their curves on top of each other, and what differs in their configurations. With --serve the
    page is read-only, for this machine alone unless --host says otherwise, and opens with the token in the address
    that is printed.

    \b
    Examples:
      meditron-train report runs/llama2-7b
      meditron-train report runs/a runs/b --output comparison.html
      meditron-train report runs/llama2-7b --serve
    """
    from meditron_train.flows.report.run_page import make_page
    from meditron_train.flows.report.write import write_page

    if serve:
        if output is not None or check_hashes or evaluation:
            raise UserError(
                "--serve goes with neither --output nor --check-hashes nor --evaluation; leave them out"
            )
        from meditron_train.flows.report.serve import ReportServer

        with ReportServer(runs, host, port) as server:
            print(f"serving {server.address} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        return
    if len(runs) > 1 and (evaluation or check_hashes):
        raise UserError("--evaluation and --check-hashes are for the report of one run; give one RUN_DIR")
    path = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    page = make_page(runs, evaluation_files=evaluation or (), check_hashes=check_hashes)
    write_page(page, path)
    print(path)
