"""The README: its ten lines are run, its numbers and picture are those of the measurements."""

import re
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import pho_service as pho

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that draws the picture."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return import_module("results")


def test_a_reader_gets_through_it() -> None:
    assert len(README.splitlines()) < 200


def test_ten_lines(
    model_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The block of Python runs as it stands, on a smaller model, and prints two results."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shutil.copytree(model_folder, tmp_path / "example" / "small-llama")
    for name, path in texts.items():
        shutil.copy(path, tmp_path / "example" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pho, "search", partial(pho.search, trials=12, finalists=1))  # for time
    given: dict[str, Any] = {}

    exec(compile(block, "README.md", "exec"), given)  # noqa: S102 - our own page

    assert len([line for line in block.splitlines() if line]) <= 10
    assert given["pruned"].sparsity == pytest.approx(0.5)
    assert Path("pruned/pruning.json").is_file()
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "windows of 128" in printed


def test_picture(drawing: Any) -> None:
    """The picture is that of the table in docs/measurements: `python docs/site/results.py`."""
    found = drawing.table((ROOT / "docs" / "measurements" / "quality.md").read_text())

    assert (ROOT / "docs" / "results.svg").read_text() == drawing.picture(*found)


def test_numbers() -> None:
    """Each row of the table of numbers is one of docs/measurements/quality.md."""
    measured = (ROOT / "docs" / "measurements" / "quality.md").read_text()
    section = README.partition("## Numbers")[2].partition("\n## ")[0]
    found = re.findall(r"^\| [^ |-].*", section, re.MULTILINE)

    assert any(row.startswith("| dense |") for row in found)
    assert len(found) >= 6
    assert all(row in measured for row in found)
