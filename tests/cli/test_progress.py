"""Progress on a terminal, in a log, and without color."""

from __future__ import annotations

import io

import pytest

from meditron_train.cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_and_not_too_many(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    clock = iter([0.0, 30.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    monkeypatch.setattr(progress._log, "info", lambda text, *values: lines.append(text % values))
    with progress.progress_bar("converting") as advance:
        for name in "abc":
            advance(name, 2**30, 4 * 2**30)
    assert lines == ["converting: 2.00 GiB of 4.00 GiB, now b"]
    with progress.progress_bar("converting", hidden=True) as advance:
        assert advance is None


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_a_bar_whose_color_can_be_turned_off(monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.progress_bar("converting") as advance:
        advance("model.safetensors", 10, 100)
    text = terminal.getvalue()
    assert "model.safetensors" in text
    assert ("\x1b[38;5" in text or "\x1b[3" in text) is (no_color == "")
