"""What `pho` says of itself."""

import re
from importlib.metadata import version

import pytest

from pho_service.cli import VERBS

NO_JSON = ("serve", "worker", "keys", "backup", "restore", "migrate")  # they give no result


def test_pho_help_names_every_verb_with_what_it_does_and_the_exit_codes(pho):
    text = " ".join(pho("--help").stdout.split())

    assert all(f"{verb} {what}" in text for verb, (_, what) in VERBS.items())
    assert "Exit codes: 0 done, 1 failed, 2 bad usage" in text


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_has_an_example_json_if_it_has_a_result(pho, verb):
    result = pho(verb, "--help")

    assert result.exit_code == 0
    assert re.search(rf"Example:\n\s+pho {verb}\s", result.stdout)
    assert "--json" in result.stdout or verb in NO_JSON
    short = pho(verb, "-h")
    assert short.stdout == result.stdout, repr(short.exception)


def test_help_begins_with_what_is_used_most_and_help_all_has_every_option(pho):
    for verb, first, rare in (
        ("search", "--pattern", "--calibration-memory"),
        ("compare", "--pattern", "--calibration-memory"),
        ("prune", "--config", "--calibration-memory"),
        ("recover", "--teacher", "--adam-bits"),
    ):
        lines = pho(verb, "--help").stdout.splitlines()
        whole = pho(verb, "--help-all").stdout
        options = re.findall(r"^  (--\S+)", "\n".join(lines).partition("-h, --help")[0], re.M)

        assert next(i for i, line in enumerate(lines) if first in line) < 15
        assert len(options) <= 8 + 2  # and --json and --help-all
        assert "required" in " ".join(lines[:10]) or verb == "prune"
        assert rare in whole
        assert rare not in options


def test_the_version_is_that_of_the_installed_distribution(pho):
    assert version("pho-service") in pho("--version").stdout


def test_a_verb_that_does_not_exist_is_bad_usage(pho):
    result = pho("squeeze")

    assert result.exit_code == 2
    assert "squeeze" in result.stderr
