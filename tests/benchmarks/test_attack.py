"""The attacks: some that take seconds, and the table that they end with."""

from importlib import import_module

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.thorough


def test_attack(monkeypatch, tmp_path):
    """Attacks that hold are counted, with the slowest health check beside each."""
    monkeypatch.chdir(tmp_path)
    names = ["odd bodies", "smuggling", "index of weights"]
    words = [word for name in names for word in ("--only", name)]
    done = CliRunner().invoke(import_module("attack").main, words, catch_exceptions=False)

    assert "3 of 3 attacks held" in done.stdout, done.stdout
    assert done.exit_code == 0
    assert [name in done.stdout for name in names] == [True] * 3
