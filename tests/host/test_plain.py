"""What others wrote, as it is shown."""

import pytest

from pho_service.errors import MOST_CHARACTERS, ServiceError, TextError, bounded, plain, plain_line


@pytest.mark.parametrize(
    ("text", "shown", "line"),
    [
        ("a text, Über ✓", "a text, Über ✓", "a text, Über ✓"),
        ("a\nb", "a\nb", "a\\nb"),
        ("\x1b[31mred\x00\r", "\\x1b[31mred\\x00\\r", "\\x1b[31mred\\x00\\r"),
        ("\u202eabc\ud800", "\\u202eabc\\ud800", "\\u202eabc\\ud800"),
    ],
)
def test_control_characters_are_told_not_done(text, shown, line):
    assert plain(text) == shown
    assert plain_line(text) == line
    plain(text).encode()


def test_an_errors_message_is_some_lines_at_most_without_its_middle_and_can_be_printed():
    long = "begin" + "x" * 10**6 + "end"
    for error in (TextError(long), ServiceError(long, code="x")):
        assert len(str(error)) < MOST_CHARACTERS + 100
        assert str(error).startswith("begin")
        assert str(error).endswith("end")
        assert "996008 characters" in str(error)
    assert str(TextError("\x1b[2J")) == "\\x1b[2J"
    assert bounded("short") == "short"
