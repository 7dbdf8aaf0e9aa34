"""
Texts that others wrote, as they may be shown: in logs, on terminals, in messages.
"""

import reprlib

MOST_CHARACTERS = 4000  # of a message: some dozen lines


def plain(text: str) -> str:
    """The text without control characters, which terminals obey; only its lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plain_line(text: str) -> str:
    """The same as one line."""
    return plain(text).replace("\n", "\\n")


def bounded(text: str) -> str:
    """The text without control characters, and without its middle if it is very long."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
    return plain(text)


def shown(value: object, most: int = 100) -> str:
    """A value of a document for a message: not long, and with nothing that cannot be printed."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    text = value if len(value) <= most else f"{value[:most]}..."
    return text if text.isprintable() else ascii(text)[1:-1]
