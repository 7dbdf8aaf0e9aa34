"""config.json: what is written is read back, and what breaks the format is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from pho_service.configuration import (
    MAX_BYTES,
    CoefficientsDocument,
    Configuration,
    Confirmation,
    Rating,
    read_configuration,
    write_configuration,
)
from pho_service.errors import ConfigurationError, OutputError
from pho_service.spec import Coefficients, Pattern, Scope

CONFIGURATION = Configuration(
    method="crepe",
    coefficients=CoefficientsDocument(
        row=0.1, column=0.2 + 0.1, neighbourhood=0.6, kernel_size=5, activation_exponent=2 / 3
    ),
    pattern="0.5",
    scope="global",
    objective={"name": "gini", "direction": "maximize", "value": 0.75},
    confirmation=Confirmation(
        perplexity=37.2, tokens=992, context_length=32, text={"source": "a", "sha256": "b"}
    ),
    candidates=[Rating(method="crepe", trial=7, proxy=0.5, perplexity=37.2)],
    baselines=[Rating(method="wanda", trial=1)],
    border=["kernel_size"],
    versions={"python": "3.11.7"},
)


def written(tmp_path: Path, **changes: Any) -> Path:
    """A file with some keys changed; ``coefficients`` changes keys of the score."""
    document = CONFIGURATION.model_dump(mode="json")
    document["coefficients"] |= changes.pop("coefficients", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document | changes))
    return path


def test_round_trip(tmp_path: Path) -> None:
    """Everything comes back, floats to the last bit."""
    write_configuration(CONFIGURATION, tmp_path / "c.json")

    assert read_configuration(tmp_path / "c.json") == CONFIGURATION


def test_same_bytes(tmp_path: Path) -> None:
    """The same configuration is the same file: nothing in it is the time or the place."""
    write_configuration(CONFIGURATION, tmp_path / "a.json")
    write_configuration(read_configuration(tmp_path / "a.json"), tmp_path / "b.json")

    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_candidate() -> None:
    """A configuration says what to prune with."""
    candidate = CONFIGURATION.candidate()

    assert candidate.method == "crepe"
    assert candidate.pattern == Pattern(sparsity=0.5, scope=Scope.GLOBAL)
    assert candidate.coefficients == Coefficients(
        row=0.1, column=0.2 + 0.1, neighbourhood=0.6, kernel_size=5, activation_exponent=2 / 3
    )


def test_groups(tmp_path: Path) -> None:
    """N:M is read as such, whatever the scope says."""
    read = read_configuration(written(tmp_path, pattern="2:4"))

    assert read.candidate().pattern == Pattern.parse("2:4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "speed: Extra inputs"),
        ({"format": "toml"}, "its format is not 'pho-configuration'"),
        ({"version": 2}, "has format version 2, but this PHO reads version 1"),
        ({"version": None}, "has format version None"),
        ({"version": True}, "version: .*integer"),
        ({"scope": "column"}, "scope: .*'row', 'layer' or 'global'"),
        ({"pattern": 0.5}, "pattern: .*string"),
        ({"pattern": "5:4"}, "pattern '5:4' keeps N=5 of M=4"),
        ({"pattern": "1.5"}, "sparsity 1.5 is not between 0 and 1"),
        ({"candidates": [{"method": "crepe"}]}, r"candidates\.0\.trial: Field required"),
        ({"confirmation": {"perplexity": "low"}}, r"confirmation\.perplexity"),
    ],
)
def test_bad_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A key that breaks the format is named, with the rule."""
    with pytest.raises(ConfigurationError, match=message):
        read_configuration(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": -0.1}, "coefficient row=-0.1"),
        ({"column": float("nan")}, r"coefficients\.column: .*finite"),
        ({"gradient_exponent": float("inf")}, r"coefficients\.gradient_exponent: .*finite"),
        ({"neighbourhood": "0.5"}, r"coefficients\.neighbourhood: .*number"),
        ({"row": 0, "column": 0, "neighbourhood": 0}, "are all zero"),
        ({"kernel_size": 4}, "kernel_size=4 is not an odd"),
        ({"kernel_size": 5.0}, r"coefficients\.kernel_size: .*integer"),
        ({"normalisation": "max"}, r"coefficients\.normalisation: .*'mean', 'sum' or 'none'"),
        ({"color": 1}, r"coefficients\.color: Extra inputs"),
    ],
)
def test_bad_coefficients(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A coefficient that makes no sense is named."""
    with pytest.raises(ConfigurationError, match=message):
        read_configuration(written(tmp_path, coefficients=change))


def test_missing_coefficients(tmp_path: Path) -> None:
    """A file without a score is refused."""
    path = written(tmp_path)
    document = json.loads(path.read_text())
    del document["coefficients"]["row"]
    path.write_text(json.dumps(document))

    with pytest.raises(ConfigurationError, match=r"coefficients\.row: Field required"):
        read_configuration(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"format": ', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is no configuration of PHO"),
        (b"null", "is no configuration of PHO"),
        (b"{}", "is no configuration of PHO"),
        (b" " * (MAX_BYTES + 1), "is larger than 1048576 bytes"),
    ],
)
def test_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    """A file of another kind is refused, and a huge one is not even read."""
    path = tmp_path / "config.json"
    path.write_bytes(content)

    with pytest.raises(ConfigurationError, match=message):
        read_configuration(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there, or is a folder, is named with the reason."""
    with pytest.raises(ConfigurationError, match=r"none\.json cannot be read: No such file"):
        read_configuration(tmp_path / "none.json")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_configuration(tmp_path)


def test_unwritable(tmp_path: Path) -> None:
    """Where nothing can be written, the reason is told."""
    with pytest.raises(OutputError, match="No such file or directory"):
        write_configuration(CONFIGURATION, tmp_path / "none" / "config.json")
