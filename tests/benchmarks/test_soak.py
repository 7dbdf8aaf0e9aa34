"""The soak: a service that is disturbed for some seconds, and the rules that it is held to."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


def test_soak(benchmark: Callable[..., Any], tmp_path: Path) -> None:
    """A few jobs under fire: every rule was looked at, none is broken, all of it is written."""
    out = tmp_path / "soak.json"
    table = benchmark(
        "soak", "--minutes", 0.1, "--every", 1, "--workers", 1, "--outside", 1, "--people", 1,
        "--only", "plain", "--only", "not divisible", "--out", out,
    )  # fmt: skip
    written = json.loads(out.read_text())

    assert table["every accepted job ends"][1] == "0"
    assert sum(written["kills"].values()) > 0
    assert sum(written["jobs"].values()) >= 3
    assert len(written["invariants"]) > 15
    assert {rule["violated"] for rule in written["invariants"].values()} == {0}


def test_violations() -> None:
    """What does not hold is counted by its rule, with the first example."""
    found = import_module("invariants").Invariants()
    for number in range(4):
        found.check("numbers are even", number % 2 == 0, f"{number} is not")
    found.check_all("letters are vowels", ["b"], of=3)

    assert found.checked == {"numbers are even": 4, "letters are vowels": 3}
    assert found.violated == {"numbers are even": 2, "letters are vowels": 1}
    assert found.examples == {"numbers are even": "1 is not", "letters are vowels": "b"}


@pytest.mark.parametrize(
    ("last", "explained"),
    [
        ("psycopg.errors.AdminShutdown: terminating connection", True),
        ("storage.studies.DatabaseGone: the database went away", True),
        ("KeyError: 'trials'", False),
    ],
)
def test_tracebacks(last: str, explained: bool) -> None:
    """A traceback is explained by its last line, and no other line by itself."""
    soak = import_module("soak")
    log = (
        f"12:00 ERROR it failed\nTraceback (most recent call last):\n  File x\n{last}\n12:01 INFO y"
    )
    (trace,) = soak._tracebacks(log)

    assert last in trace
    assert "12:01" not in trace
    assert bool(soak.EXPLAINED.search(trace)) is explained
