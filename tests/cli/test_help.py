"""What `pho` says of itself."""

import re
from collections.abc import Callable
from importlib.metadata import version

import pytest
from click.testing import Result

from pho_service.cli import VERBS

Pho = Callable[..., Result]


def test_pho_help_names_every_verb_with_what_it_does_and_the_exit_codes(pho: Pho) -> None:
    text = " ".join(pho("--help").stdout.split())

    assert all(f"{verb} {what}" in text for verb, (_, what) in VERBS.items())
    assert "Exit codes: 0 done, 1 failed, 2 bad usage" in text


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help(pho: Pho, verb: str) -> None:
    """Each verb's help has an example, --json if it has a result, and --help in both spellings."""
    result = pho(verb, "--help")

    assert result.exit_code == 0
    assert re.search(rf"Example:\n\s+pho {verb} ", result.stdout)
    assert "--json" in result.stdout or verb in ("serve", "worker", "keys", "backup", "restore")
    short = pho(verb, "-h")
    assert short.stdout == result.stdout, repr(short.exception)


def test_the_version_is_that_of_the_installed_distribution(pho: Pho) -> None:
    assert version("pho-service") in pho("--version").stdout


def test_a_verb_that_does_not_exist_is_bad_usage(pho: Pho) -> None:
    result = pho("squeeze")

    assert result.exit_code == 2
    assert "squeeze" in result.stderr
