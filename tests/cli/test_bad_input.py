"""What a user does wrong: one clear line, the right exit code, no debris."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from pho_service.cli import main

CALIBRATION = ["--samples", "4", "--context-length", "24", "--projection-rows", "8"]


def pho(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.stderr


@pytest.fixture
def search(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> list[object]:
    """A search that would work."""
    return [
        "search", model_folder, "--text", texts["calibration"], "--trials", 8, *CALIBRATION,
        "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", tmp_path / "out.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "0.5", "--kernel-sizes", "x"], "not numbers"),
        (["--pattern", "0.5", "--calibration-memory", "1.5MiB"], "but may take 2 MiB"),
        (["--pattern", "0.5", "--device", "cuda:77"], "does not exist"),
    ],
)
def test_usage(search: list[object], tmp_path: Path, options: list[str], message: str) -> None:
    """Bad usage is exit code 2, names the value, and writes nothing."""
    code, error = pho(*search, *options)

    assert code == 2
    assert message in error
    assert not (tmp_path / "out.json").exists()


def test_no_folder_for_the_result(search: list[object], tmp_path: Path) -> None:
    code, error = pho(*search, "--pattern", "0.5", "--out", tmp_path / "no" / "c.json")

    assert code == 1
    assert "does not exist" in error
    assert not (tmp_path / "s.db").exists()


def test_study_is_no_database(search: list[object], tmp_path: Path) -> None:
    """A file that is no database is refused and left alone."""
    (tmp_path / "s.db").write_text("my notes " * 500)
    code, error = pho(*search, "--pattern", "0.5")

    assert code == 1
    assert "not a database" in error
    assert (tmp_path / "s.db").read_text() == "my notes " * 500
