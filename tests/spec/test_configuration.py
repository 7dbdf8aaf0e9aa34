"""config.json: what is written is read, and nonsense is refused by key."""

import json
from pathlib import Path

import pytest

from pho_service.errors import ConfigurationError, OutputError
from pho_service.spec.configuration import Configuration, read_configuration, write_configuration
from pho_service.spec.pattern import Coefficients

GOOD = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.2, column=0.5, neighbourhood=0.3, kernel_size=9, activation_exponent=0.1 + 0.2
    ),
    pattern="0.5",
    scope="global",
)


def changed(**changes):
    """A good document with changes; dots lead into it."""
    document = GOOD.model_dump(mode="json")
    for key, value in changes.items():
        target = document
        *path, last = key.split("__")
        for part in path:
            target = target[part]
        target[last] = value
    return document


def test_everything_comes_back_numbers_to_the_bit(tmp_path):
    write_configuration(GOOD, tmp_path / "c.json")

    assert read_configuration(tmp_path / "c.json") == GOOD
    assert read_configuration(str(tmp_path / "c.json")) == GOOD


def test_the_file_of_a_transfer_is_read_as_the_configuration_that_it_is_of(tmp_path):
    path = tmp_path / "transfer.json"
    transfer = {"format": "pho-transfer", "version": 1, "source": "x", "configuration": changed(),
                "targets": []}  # fmt: skip
    path.write_text(json.dumps(transfer))

    assert read_configuration(path) == Configuration.model_validate(changed())


def test_the_documented_minimum_is_enough(tmp_path):
    keys = ("format", "version", "method", "coefficients", "pattern", "scope")
    document = {key: changed()[key] for key in keys}
    (tmp_path / "c.json").write_text(json.dumps(document))

    assert read_configuration(tmp_path / "c.json").candidate() == GOOD.candidate()


def with_value(text):
    return json.dumps(changed(search={"x": "here"})).replace('"here"', text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(speed=1), "speed: Extra inputs"),
        (changed(version=3), "format version 3, but this PHO reads version 2"),
        (changed(format="other"), "is not a configuration of PHO"),
        ([], "is not a configuration of PHO"),
        (changed(coefficients__kernel_size=4), "kernel_size=4 is not an odd"),
        (changed(pattern="5:4"), "keeps N=5 of M=4"),
        *((content, "is not JSON") for content in ("", "{", "[" * 100_000, "\x00")),
        *((with_value(value), r"c\.json .*a value that JSON cannot represent")
          for value in ("1e999", "NaN", '"\\ud800"')),
        (with_value('"\\u0000"'), r"c\.json .*U\+0000"),
        (with_value("[" * 200 + "]" * 200), r"c\.json .*lists and objects deep"),
        (None, "No such file"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(tmp_path, content, message):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(ConfigurationError, match=message):
        read_configuration(path)


def test_where_a_configuration_cannot_be_written_what_was_there_stays(tmp_path):
    folder = tmp_path / "c.json"
    folder.mkdir()

    with pytest.raises(OutputError, match="is a folder"):
        write_configuration(GOOD, folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "document",
    [
        changed(version="3" * 1_000_000),
        {**changed(), **{f"key {i}": 1 for i in range(50_000)}},
        changed(**{"x" * 1_000_000: 1}),
    ],
    ids=["version", "unknown keys", "long key"],
)
def test_however_much_is_wrong_the_message_is_short(tmp_path, document):
    (tmp_path / "c.json").write_text(json.dumps(document))

    with pytest.raises(ConfigurationError, match=r"c\.json") as raised:
        read_configuration(tmp_path / "c.json")

    assert len(str(raised.value)) < 2000


def test_what_never_ends_is_read_no_further_than_a_configuration_may_be_long():
    with pytest.raises(ConfigurationError, match="larger than 1048576 bytes"):
        read_configuration(Path("/dev/zero"))
