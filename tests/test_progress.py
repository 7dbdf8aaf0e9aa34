"""Bars: where somebody can see them, and full at their end."""

import io
import sys

import pytest

from pho_service.progress import bar, bars, silent


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


def test_bars_are_shown_by_default_where_stderr_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    in_a_pipe = bars(None), bars(True)
    monkeypatch.setattr(sys, "stderr", Terminal())

    assert in_a_pipe == (silent, bar)
    assert (bars(None), bars(False)) == (bar, silent)


def test_a_bar_of_work_that_ends_early_is_full_and_its_numbers_are_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    with bar("Searching (activation-reconstruction/blend)", 4000) as advance:
        advance(3100)

    assert "4000/4000" in shown.getvalue()
    assert "…" not in shown.getvalue()
