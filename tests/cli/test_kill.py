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


def words(bundle, folder):
    """A search."""
    return [
        "search", str(bundle), "--preset", "score",
            "--pattern", "0.5", "--trials", str(TRIALS), "--kernel-sizes", "3,5",
        "--study", f"sqlite:///{folder / 'study.db'}", "--out", str(folder / "config.json"),
    ]  # fmt: skip


def recorded(database):
    """How many trials the study has so far."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM trials").fetchone()
            return int(count)
    except sqlite3.OperationalError:  # not there yet
        return 0


def search(bundle, folder):
    """Run it to its end, in this process."""
    result = CliRunner().invoke(main, words(bundle, folder), catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed(bundle_file, tmp_path, stop):
    """After kill -9 or Ctrl-C, the same command ends with the same bytes."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    search(bundle_file, undisturbed)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pho_service.cli import main; main()",
            *words(bundle_file, killed),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs this in the background has its children ignore Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while recorded(killed / "study.db") < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=240)
    before = recorded(killed / "study.db")

    assert 15 <= before < TRIALS
    assert not (killed / "config.json").exists()
    if stop is signal.SIGINT:
        assert process.returncode == 1
        assert "interrupted" in error
    search(bundle_file, killed)
    assert recorded(killed / "study.db") == TRIALS
    assert (killed / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()
