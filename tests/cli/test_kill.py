"""A search that is killed goes on, and ends as if nothing had happened."""

import functools
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from click.testing import CliRunner

from pho_service.cli import main

TRIALS = 80


def recorded(database):
    """How many trials the study has so far."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM trials").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed(made_bundle, tmp_path, stop):
    """After kill -9 or Ctrl-C, the same command ends with the same bytes."""

    def words(name):
        return [
            "search", str(made_bundle), "--preset", "score", "--pattern", "0.5",
            "--trials", str(TRIALS), "--kernel-sizes", "3,5",
            "--study", f"sqlite:///{tmp_path / name}.db", "--out", str(tmp_path / f"{name}.json"),
        ]  # fmt: skip

    def search(name):
        result = CliRunner().invoke(main, words(name), catch_exceptions=False)
        assert result.exit_code == 0, result.output

    search("undisturbed")
    process = subprocess.Popen(
        [sys.executable, "-c", "from pho_service.cli import main; main()", *words("killed")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs this in the background has its children ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while recorded(tmp_path / "killed.db") < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=240)

    assert 15 <= recorded(tmp_path / "killed.db") < TRIALS
    assert not (tmp_path / "killed.json").exists()
    if stop is signal.SIGINT:
        assert process.returncode == 1
        assert "interrupted" in error
    search("killed")
    assert recorded(tmp_path / "killed.db") == TRIALS
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
