"""Bars: where somebody can see them, and full at their end."""

import io
import re
import sys

from pho_service.progress import bar, bars, silent


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self):
        return True


def test_bars_are_shown_by_default_where_stderr_is_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    in_a_pipe = bars(None), bars(True)
    monkeypatch.setattr(sys, "stderr", Terminal())

    assert in_a_pipe == (silent, bar)
    assert (bars(None), bars(False)) == (bar, silent)


def test_a_bar_of_work_that_ends_early_is_full_and_its_numbers_are_whole_at_80_columns(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    with bar("Searching (activation-reconstruction/blend)", 4000) as advance:
        advance(3100)

    short = shown.getvalue()
    with bar("[0.5, 1 of 2] Searching (activation-reconstruction/blend)", 12) as advance:
        advance(12)

    assert "4000/4000" in short
    assert "…" not in short
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", shown.getvalue())
    assert "reconstruct… ━━━━ 12/12 0:00:00 left 0:00:00" in plain
