"""The folder that a worker works in."""

import os
import time
from pathlib import Path

import pytest

from workers.process import own_folder


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The folder of a worker that was killed an hour ago."""
    folder = tmp_path / "pho-worker-killed"
    folder.mkdir()
    (folder / "in-use").touch()
    (folder / "something").touch()
    _age(folder)
    return folder


def _age(folder: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(folder / "in-use", (hour_ago, hour_ago))


def test_killed_workers(tmp_path: Path, killed: Path) -> None:
    """What a killed worker has left is removed by the next one; other folders are not."""
    other = tmp_path / "pho-worker"
    other.mkdir()
    with own_folder(tmp_path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, other])

    assert not killed.exists()
    assert not folder.exists()


def test_the_folder_of_a_worker_that_lives_stays_however_old_it_is(tmp_path: Path) -> None:
    with own_folder(tmp_path) as first:
        _age(first)
        with own_folder(tmp_path) as second:
            assert {first, second} == {*tmp_path.iterdir()}


def test_beginning(tmp_path: Path, killed: Path) -> None:
    """A folder that has just been made may be about to be locked, and stays."""
    (killed / "in-use").unlink()
    (killed / "in-use").touch()
    with own_folder(tmp_path):
        assert killed.exists()
