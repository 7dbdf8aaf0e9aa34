"""The one format of measured numbers: a terminal, a page and a card show the same digits."""

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | None) -> str:
    """Four significant digits, or all before the point; empty where there is none."""
    if value is None:
        return ""
    if 999.95 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if value else "0"


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share in percent, with one digit after the point."""
    return "" if share is None else f"{share:{'+' if signed else ''},.1%}"


def seconds(value: float | None) -> str:
    """A duration, with one digit after the point."""
    return "" if value is None else f"{value:,.1f}"


def listed(values: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Names and their values in a line: ``row 0.2500, kernel 5``."""
    pairs = values.items() if isinstance(values, Mapping) else values
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}" for name, value in pairs
    )
