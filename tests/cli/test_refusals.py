"""Every refusal is one sentence with the right exit code, and leaves nothing behind."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Pho = Callable[..., Result]

SMALL = "--context-length 32 --samples 6 --kernel-sizes 3,5"
CALIBRATE = "calibrate {model} --text {text} --out x.safetensors"
SEARCH = "search {bundle} --pattern 0.5 --kernel-sizes 3,5"
EVALUATE = "evaluate {model} --context-length 32"
VALIDATE = "validate {model} --text {text} " + SMALL
PRUNE = "prune {model} --config {config} --bundle {bundle} --out pruned"


def configured(folder: Path, **coefficients: Any) -> Path:
    """A configuration by hand."""
    score = {
        "row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    document = {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score | coefficients,
    }  # fmt: skip
    path = folder / "by-hand.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def places(
    model_folder: Path, bundle_file: Path, texts: dict[str, Path], tmp_path: Path
) -> dict[str, Path]:
    """What words in braces stand for."""
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("the model")
    empty.write_text(" \n")
    return {
        "model": model_folder, "bundle": bundle_file, "text": texts["calibration"],
        "short": short, "empty": empty, "tmp": tmp_path, "config": configured(tmp_path),
    }  # fmt: skip


def refused(pho: Pho, words: str, places: dict[str, Path]) -> tuple[int, str]:
    """Exit code and message of a command that must leave nothing behind."""
    result = pho(*words.format(**places).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith(("pho: ", "Error: "))]

    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(lines) == 1
    assert result.stdout == ""
    assert list(Path().iterdir()) == []
    return result.exit_code, lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (SEARCH + " --pattern 2:5", r"layers\.0\.\S+: in_features=32 is not a multiple of M=5"),
        (SEARCH + " --seed -1", "--seed -1 is below 0"),
        (SEARCH + " --text {text}", "is a bundle: it needs no text"),
        (SEARCH + " --objective perplexity", "perplexity needs the model and a text"),
        (VALIDATE + " --pattern 0.5 --candidates 7", "--candidates 7 is below 8"),
        (
            EVALUATE + " --text {text} --data-file a",
            "--data-file a: data_file is a file of a dataset",
        ),
        (EVALUATE + " --text {text} --revision main", "is for hub ids"),
        (CALIBRATE + " --out x.bin", r"must end in \.safetensors"),
        (VALIDATE + " --pattern 0.5 --plot a.png", r"a\.png is not a name of a page.*a\.html"),
        (PRUNE + " --text {text}", "--bundle and a text are both given"),
    ],
)
def test_bad_usage(pho: Pho, places: dict[str, Path], words: str, message: str) -> None:
    """A value that breaks a rule is named with the rule; exit code 2."""
    code, said = refused(pho, words, places)

    assert code == 2
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate {text} --text {text}", r"is neither a folder nor a \.gguf or \.pho file"),
        (EVALUATE + " --text {short}", "2 tokens, which do not fill one window of 32"),
        (VALIDATE + " --pattern 0.5 --samples 99", "no text to measure perplexity on"),
        (PRUNE + " --config none.json", r"none\.json cannot be read: No such file"),
        (PRUNE + " --out {text}", "is a file"),
        (CALIBRATE + " --out no/x.safetensors", "the folder .*no does not exist"),
        (VALIDATE + " --pattern 0.5 --plot no/plot.html", "the folder .*no does not exist"),
        (SEARCH + " --study study.db", r"'study\.db' is not a database URL"),
        (SEARCH + " --study sqlite:///no/study.db", "the folder .*no does not exist"),
    ],
)
def test_failure(pho: Pho, places: dict[str, Path], words: str, message: str) -> None:
    """What is not there, or cannot be used, is named; exit code 1."""
    code, said = refused(pho, words, places)

    assert code == 1
    assert re.search(message, said)


@pytest.fixture
def full_disk(
    places: dict[str, Path], limited_disk: Callable[[int], AbstractContextManager[None]]
) -> Iterator[dict[str, Path]]:
    """``places``, where no file may grow beyond 20,000 bytes: a write fails as on a full disk."""
    with limited_disk(20_000):
        yield places


def test_bundle_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    code, said = refused(pho, f"{CALIBRATE} {SMALL}", full_disk)

    assert code == 1
    assert "x.safetensors was not written" in said


def test_folder_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    code, said = refused(pho, PRUNE, full_disk)

    assert code == 1
    assert "pruned was not written" in said


def test_study_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    result = pho(*SEARCH.format(**full_disk).split())

    assert result.exit_code == 1
    assert "the database fails: " in result.stderr
    assert not Path("config.json").exists()


def test_database_without_a_driver(pho: Pho, places: dict[str, Path]) -> None:
    """A database whose driver is not installed is refused in words."""
    code, said = refused(pho, SEARCH + " --study postgresql+pg8000://localhost/pho", places)

    assert code == 1
    assert "postgresql" in said


def test_own_kernel_sizes_of_a_bundle(pho: Pho, places: dict[str, Path]) -> None:
    calibrated = pho(
        *f"{CALIBRATE} --context-length 32 --samples 6 --kernel-sizes 3,7".format(**places).split()
    )
    found = pho("search", "x.safetensors", "--pattern", "0.5", "--trials", 12,
                "--space", "kernel_sizes=7")  # fmt: skip

    assert calibrated.exit_code == 0
    assert found.exit_code == 0, found.stderr


def test_huge_kernel_size(pho: Pho, places: dict[str, Path]) -> None:
    """A kernel size that no tensor can have is refused in words."""
    places["config"] = configured(places["tmp"], kernel_size=10**12 + 1)
    code, said = refused(pho, PRUNE, places)

    assert code in (1, 2)
    assert "kernel_size" in said


def test_empty_name_of_a_text(
    pho: Pho, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pho("evaluate", places["model"], "--text", "", "--context-length", 32)

    assert result.exit_code != 0
    assert "c4" not in result.stderr
