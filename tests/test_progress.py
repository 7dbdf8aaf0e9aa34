"""Bars: where somebody can see them, and full at their end."""

import io
import re
import sys
import time

import pytest

from pho_service.cli.terminal import working
from pho_service.progress import Steps, about, bar, bars, one_bar, silent


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


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, to be set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_step_tells_its_number_and_how_long_it_takes_by_the_plan_and_by_the_steps_before(clock):
    said = []
    steps = Steps({"calibrate": 20.0, "search": 60.0, "prune": 120.0}, said.append)
    steps.begin("calibrate")
    clock[0] = 60.0
    steps.begin("search")
    steps.begin("search")

    assert said == ["Step 1 of 3: calibrate (about 20 s)", "Step 2 of 3: search (about 2 min)"]
    # Three times as slow as planned; a fifth of the plan is trusted: (60 + 40) / (20 + 40)
    assert steps.left_s(0.0) == pytest.approx(100 / 60 * (60 + 120))


def test_a_step_that_is_given_a_time_is_told_with_it_whatever_those_before_took(clock):
    said = []
    steps = Steps({"search": 600.0, "recover": 300.0}, said.append)
    steps.begin("search")
    clock[0] = 300.0
    steps.give("recover", 900)
    steps.begin("recover")

    assert said[1] == "Step 2 of 2: recover (about 15 min)"
    assert steps.left_s(0.0) == pytest.approx(900)


def test_the_time_that_is_left_goes_by_the_piece_of_work_where_that_says_more_than_the_plan(clock):
    steps = Steps({"ask": 1.0, "train": 4.0}, lambda _: None)
    steps.begin("ask")
    clock[0] = 10.0
    by_plan, by_piece = (steps.left_s(left) for left in (0.0, 40.0))

    # Of a plan of 5, 1 is trusted: the step takes 10 or 50 seconds where it was planned to take 1.
    assert by_plan == pytest.approx(4 * (10 + 1) / (1 + 1))
    assert by_piece == pytest.approx(40 + 4 * (50 + 1) / (1 + 1))


def test_all_bars_are_one_that_says_the_step_that_is_left_and_the_piece_of_work(monkeypatch):
    shown, said = Terminal(), []
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "100")
    begins = {"Searching": "search", "Writing": "write"}  # of which nothing is planned
    with one_bar({"calibrate": 1.0, "search": 600.0}, said.append, begins=begins):
        with bar("Searching (activation-reconstruction/blend)", 4), bar("Writing", 1):
            pass
        with working("Reading a text"), bar("Racing finalists", 36) as advance:
            advance(12)
            time.sleep(0.3)  # it is drawn ten times a second
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", shown.getvalue())

    assert said == ["Step 2 of 2: search (about 10 min)"]
    assert re.search(r"━━+ +\d+% 0:00:00 about \d+ min left  Racing finalists 12/36", plain)
    assert "36/36" not in plain


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "a few seconds"), (44, "about 40 s"), (200, "about 3 min")]
)
def test_a_time_that_is_estimated_has_one_digit(seconds, words):
    assert about(seconds) == words
