"""Tables of the verbs: readable at every width, a line a row in a pipe; and Ctrl-C."""

import signal
from contextlib import nullcontext, suppress

import pytest

from pho_service.cli.remote import short_ids
from pho_service.cli.terminal import print_table, verb

COLUMNS = ("id", "name", "state", "trials", "perplexity", "RIA")
ROWS = (
    ("94b991f8", "small-llama 0.7", "succeeded", "200/200", "16.91", "29.8"),
    ("f14a69f0", "a name of 40 characters that somebody gave", "running", "9/200", None, None),
)


@pytest.fixture
def lines(capsys, monkeypatch):
    """The lines of a table where COLUMNS says how wide they may be, or in a pipe."""

    def printed(width):
        monkeypatch.setenv("COLUMNS", str(width or ""))
        print_table("Jobs", COLUMNS, ROWS, caption="A caption.", spare=("RIA",))
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return printed


def test_in_a_pipe_a_row_is_a_line_with_all_its_columns_text_is_aligned_left(lines):
    title, header, first, second, _ = (line for line in lines(None) if line[:1].isalnum())

    assert title == "Jobs"
    assert header.split() == [*COLUMNS]
    assert first.index("small-llama") == second.index("a name") == header.index("name")
    assert first.index("200/200") + 7 == second.index("9/200") + 5 == header.index("trials") + 6
    assert first.endswith(" 29.8")


def test_on_a_narrow_terminal_a_spare_column_goes_first_then_each_cell_has_a_line(lines):
    for width in (100, 80, 70):
        shown = lines(width)
        text = "\n".join(shown)

        assert max(map(len, shown)) <= width
        assert "…" not in text
        assert "succeeded" in text
        assert "16.91" in text
        assert ("29.8" in text) is (width == 100)
        assert ("No room for: RIA." in text) is (width < 100)
    shown = lines(40)
    assert "name        small-llama 0.7" in shown
    assert "RIA         29.8" in shown
    assert not any("No room" in line for line in shown)


def test_ids_are_as_short_as_tells_them_apart_but_not_shorter_than_8_characters():
    one, other = "94b991f8-0000-4000-8000-000000000000", "94b991f8-1000-4000-8000-000000000000"

    assert short_ids([one]) == {one: "94b991f8"}
    assert short_ids([one, other]) == {one: "94b991f8-0", other: "94b991f8-1"}
    assert short_ids([]) == {}


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_ends_in_a_line_also_where_a_library_makes_another_error_of_it(capsys, swallowed):
    @verb
    def interrupted():
        with suppress(KeyboardInterrupt) if swallowed else nullcontext():
            signal.raise_signal(signal.SIGINT)
        raise IndexError

    with pytest.raises(SystemExit) as ended:
        interrupted()

    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("pho: interrupted. What was finished is kept")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
