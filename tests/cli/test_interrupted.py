"""A search in a process of its own that is stopped in the middle, politely and not."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import Result

Pho = Callable[..., Result]

TRIALS = 160


def finished_trials(database: Path) -> int:
    """How many trials a study holds; 0 while it is being made."""
    if not database.is_file():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            (count,) = connection.execute("SELECT COUNT(*) FROM trials").fetchone()
        except sqlite3.OperationalError:
            return 0
    assert isinstance(count, int)
    return count


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_goes_on(pho: Pho, bundle_file: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """Stopped by Ctrl-C or kill -9 and started again, a search writes what an undisturbed does."""
    words = [
        "search", str(bundle_file), "--pattern", "0.5", "--scope", "global",
        "--space", "kernel_sizes=3,5", "--trials", str(TRIALS),
    ]  # fmt: skip
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "from pho_service.cli import main; main()", *words],
        cwd=disturbed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while finished_trials(disturbed / "study.db") < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    left = finished_trials(disturbed / "study.db")
    existed = (disturbed / "config.json").exists()
    study, out = f"sqlite:///{disturbed / 'study.db'}", disturbed / "config.json"
    continued = pho(*words, "--study", study, "--out", out)
    undisturbed = pho(*words)

    assert process.returncode == (1 if stop is signal.SIGINT else -stop)
    assert ("the same command goes on" in errors) is (stop is signal.SIGINT)
    assert 20 <= left < TRIALS
    assert not existed
    assert continued.exit_code == undisturbed.exit_code == 0
    assert finished_trials(disturbed / "study.db") == TRIALS
    assert out.read_bytes() == Path("config.json").read_bytes()
