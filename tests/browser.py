"""Headless Chromium for tests of pages: Debian's, or any other that is installed, driven by playwright.

Where there is none, the tests that need one are skipped with the reason. `python -m tests.browser install` gets it from
Debian's packages; a machine that cannot have it says so and exits 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_PACKAGE = "chromium-headless-shell"


def chromium() -> str | None:
    """The program, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def why_not() -> str | None:
    """Why pages cannot be tested here; None where they can."""
    if (
        importlib.util.find_spec("playwright") is None
        or importlib.util.find_spec("axe_playwright_python") is None
    ):
        return "playwright and axe-playwright-python are not installed (pip install 'meditron-train[dev]')"
    if chromium() is None:
        return "there is no Chromium (python -m tests.browser install, as root on Debian)"
    return None


@dataclass
class OpenPage:
    """A page in the browser, and what it did that it should not."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def wait_for_charts(self) -> None:
        self.page.wait_for_selector("html[data-drawn=yes]", timeout=60_000, state="attached")

    def contrast_problems(self) -> list[str]:
        """What axe-core's rules on the contrast of text find, with the element and both colors."""
        from axe_playwright_python.base import AXE_FILE_PATH

        self.page.evaluate(Path(AXE_FILE_PATH).read_text(encoding="utf-8"))  # which the page's policy allows
        rules = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
        found = self.page.evaluate("rules => axe.run(document, rules)", rules)
        assert found["passes"], "axe-core looked at no text"
        return [
            f"{node['html'][:120]}: {node['any'][0]['message']}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def opened(
    running: Any,
    address: str,
    *,
    dark: bool = False,
    width: int = 1280,
    height: int = 900,
    scale: float = 1.0,
) -> Iterator[OpenPage]:
    """`address` in a window of its own; all it asks for is listed, errors too."""
    context = running.new_context(
        color_scheme="dark" if dark else "light",
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
    )
    try:
        found = OpenPage(context.new_page())
        found.page.on(
            "console", lambda said: found.errors.append(said.text) if said.type == "error" else None
        )
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(address)
        yield found
    finally:
        context.close()


def install() -> None:
    """Get Chromium from Debian's packages, if that is possible."""
    if chromium() is not None:
        print(f"Chromium is there: {chromium()}")
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print("Chromium is not installed: this needs apt-get and root. The tests of pages will be skipped.")
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", _PACKAGE]):
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 300}
        try:
            subprocess.run(["apt-get", *words], env=environment, check=True, **options)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or b"").decode(errors="replace").strip()[-300:]
            print(f"Chromium could not be installed; the tests of pages will be skipped: {error} {said}")
            return
    print(f"Chromium is installed: {chromium()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        raise SystemExit("write: python -m tests.browser install")
    install()
