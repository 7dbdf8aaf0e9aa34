"""The notebook works as it stands: its cells are run, on SmolLM2."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return import_module("notebook")


@pytest.mark.thorough
def test_cells(notebook, tmp_path, monkeypatch):
    """Each cell runs, and gives the same first line as the file shows, and the same sparsity."""
    monkeypatch.chdir(tmp_path)
    document = json.loads(notebook.NOTEBOOK.read_text())
    shown = [notebook.shown(cell) for cell in notebook.code_cells(document)]
    given = notebook.run(document)

    recipe = json.loads((tmp_path / "pruned" / "pruning.json").read_text())

    assert [first_line(text) for text in given] == [first_line(text) for text in shown]
    assert re.findall(r"sparsity (0\.\d+)", "".join(given)) == ["0.5000"]
    assert recipe["configuration"] == json.loads((tmp_path / "config.json").read_text())
    assert len(shown) >= 7
    assert all(shown)


def first_line(text):
    """Without numbers, and without the study's name, which has a hash."""
    line = re.sub(r"of study '.*'", "", text.partition("\n")[0])
    return re.sub(r"-?\d+(\.\d+)?(e-\d+)?", "0", line)
