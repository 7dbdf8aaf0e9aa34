"""The attacks: some that take seconds, and the table that they end with."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.thorough


def test_attack(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Attacks that hold are counted, with the slowest health check beside each."""
    monkeypatch.chdir(tmp_path)
    names = ["odd bodies", "smuggling", "index of weights"]
    words = [word for name in names for word in ("--only", name)]
    done = CliRunner().invoke(import_module("attack").main, words, catch_exceptions=False)

    assert "3 of 3 attacks held" in done.stdout, done.stdout
    assert done.exit_code == 0
    assert [name in done.stdout for name in names] == [True] * 3


def test_an_attack_that_succeeds_or_cannot_be_made_is_told() -> None:
    attack, target = import_module("attack"), import_module("attack_target")

    def tried(run: Callable[[Any], str | None]) -> str:
        return str(attack._tried(target.Attack(name="a", about="b", run=run), None))

    def broken(_target: Any) -> str:
        raise OSError("no route")

    assert tried(lambda _: "it went down") == "it went down"
    assert tried(broken) == "OSError: no route"
    assert tried(lambda _: None) == ""


def test_known_names_are_listed() -> None:
    done = CliRunner().invoke(import_module("attack").main, ["--only", "nonsense"])

    assert done.exit_code == 2
    assert "There are: odd bodies" in done.stderr
