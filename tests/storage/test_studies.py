"""The study's database: opened with care, failing with words."""

import sqlite3
from pathlib import Path

import optuna
import pytest

from storage.studies import StorageError, open_storage, open_study


def test_write_ahead_log(tmp_path: Path) -> None:
    """SQLite files are in write-ahead logging, which makes a commit cheap."""
    path = tmp_path / "study.db"
    with open_storage(f"sqlite:///{path}") as storage:
        open_study(storage, "a", direction="minimize")
    with sqlite3.connect(path) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()

    assert mode == "wal"


def test_kept(tmp_path: Path) -> None:
    """A study is there when it is opened again."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with open_storage(url) as storage:
        open_study(storage, "a", direction="minimize").add_trial(
            optuna.trial.create_trial(value=1.5)
        )
    with open_storage(url) as storage:
        study = open_study(storage, "a", direction="minimize")

        assert [t.value for t in study.trials] == [1.5]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "'study.db' is not a database URL. Write sqlite:///study.db"),
        ("nosuch://x/y", "is not a database URL"),
        ("sqlite://", "a database in memory, which keeps nothing"),
        ("sqlite:////no/such/folder/study.db", "the folder /no/such/folder does not exist"),
    ],
)
def test_bad_url(url: str, message: str) -> None:
    """A URL that cannot work is refused with the way out."""
    with pytest.raises(StorageError, match=message), open_storage(url):
        pass


def test_not_a_database(tmp_path: Path) -> None:
    """A file of another kind is left alone."""
    path = tmp_path / "notes.txt"
    path.write_text("my notes, dear to me, and long enough to be no database header " * 10)
    before = path.read_bytes()

    with pytest.raises(StorageError, match="not a database"), open_storage(f"sqlite:///{path}"):
        pass
    assert path.read_bytes() == before
