"""The scripts of benchmarks/, in this process."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts find each other, as when one is started; they leave the threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(SCRIPTS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Run a script with these words in this process, in ``tmp_path``; the rows that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        main = import_module(name).main
        done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return rows(done.stdout)

    return run


def rows(output):
    """The cells of each line that looks like a row of a table, by the first one."""
    found = {}
    for line in output.splitlines():
        cells = re.split(r"\s*\|\s*|\s{2,}", line.strip(" |"))
        if len(cells) > 1:
            found[cells[0]] = cells[1:]
    return found
