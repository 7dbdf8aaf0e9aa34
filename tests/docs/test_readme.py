"""The README: its ten lines are run, its numbers and picture are those of the measurements."""

import re
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

import pho_service as pho

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def drawing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return import_module


def test_the_block_of_python_runs_as_it_stands_on_a_smaller_model(
    model_folder, texts, tmp_path, monkeypatch, capsys
):
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shutil.copytree(model_folder, tmp_path / "example" / "small-llama")
    for name, path in texts.items():
        shutil.copy(path, tmp_path / "example" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pho, "search", partial(pho.search, trials=12, finalists=1))  # for time
    given = {}

    exec(compile(block, "README.md", "exec"), given)  # noqa: S102 - our own page

    assert len([line for line in block.splitlines() if line]) <= 10
    assert given["pruned"].sparsity == pytest.approx(0.7, abs=0.01)
    assert Path("pruned/pruning.json").is_file()
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "windows of 128" in printed


def test_the_picture_is_that_of_the_measurements(drawing):
    bars = drawing("results")
    found = bars.table((ROOT / "docs" / "measurements" / "quality.md").read_text())

    assert (ROOT / "docs" / "results.svg").read_text() == bars.picture(*found)


@pytest.mark.parametrize(("page", "name"), [("quality", "sizes"), ("speed", "minutes")])
def test_the_curves_are_those_of_the_measurements(drawing, page, name):
    measured = (ROOT / "docs" / "measurements" / f"{page}.md").read_text()
    chart = getattr(drawing("curves"), name)(measured)

    assert (ROOT / "docs" / f"{name}.svg").read_text() == chart.svg()


def test_each_row_of_the_table_of_numbers_is_one_of_the_measurements():
    measured = (ROOT / "docs" / "measurements" / "quality.md").read_text()
    section = README.partition("## Numbers")[2].partition("\n## ")[0]
    found = re.findall(r"^\| [^ |-].*", section, re.MULTILINE)

    assert any(row.startswith("| dense |") for row in found)
    assert len(found) >= 6
    assert all(row in measured for row in found)
