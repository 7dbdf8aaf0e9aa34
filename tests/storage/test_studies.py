"""The study's database: opened with care, failing with words."""

import gc
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from weakref import WeakSet

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from storage.studies import StorageError, open_storage, open_study


def test_sqlite_files_are_in_write_ahead_logging_which_makes_a_commit_cheap(tmp_path):
    path = tmp_path / "study.db"
    with open_storage(f"sqlite:///{path}") as storage:
        open_study(storage, "a", direction="minimize")
    with sqlite3.connect(path) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()

    assert mode == "wal"


def finished(number, *, failed=False):
    """A trial as a search records it."""
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=None if failed else 1 / (number + 3),
        params={"x": number / 7, "k": 3 + 2 * (number % 3), "method": "crepe"},
        distributions={
            "x": FloatDistribution(0.0, 4.0),
            "k": CategoricalDistribution((3, 5, 7)),
            "method": CategoricalDistribution(("crepe", "wanda")),
        },
        user_attrs={"seconds": 0.25 * number, "steps": {"update": "none"}, "empty": []},
    )


def test_a_study_in_few_statements_reads_as_optunas_own(tmp_path):
    trials = [finished(i, failed=i == 2) for i in range(5)]
    read = []
    for name, opened in (
        ("ours", open_storage(f"sqlite:///{tmp_path / 'ours.db'}")),
        ("theirs", nullcontext(RDBStorage(f"sqlite:///{tmp_path / 'theirs.db'}"))),
    ):
        with opened as storage:
            open_study(storage, name, direction="minimize").add_trials(trials)
            storage.remove_session()
            storage.engine.dispose()
        again = RDBStorage(f"sqlite:///{tmp_path / name}.db")
        read.append(optuna.load_study(study_name=name, storage=again).trials)
        again.remove_session()
        again.engine.dispose()

    assert read[0] == read[1]
    assert [t.number for t in read[0]] == [0, 1, 2, 3, 4]


def test_trials_are_read_a_page_at_a_time_and_share_their_distributions(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.studies._PAGE", 3)
    alive = WeakSet()
    at_once = []
    gc.freeze()  # or each collection looks at all that was imported

    def loaded(trial, _context):
        alive.add(trial)
        gc.collect()
        at_once.append(len(alive))

    with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
        study = open_study(storage, "a", direction="minimize")
        open_study(storage, "b", direction="minimize").add_trials([finished(9)])
        study.add_trials([finished(i, failed=i == 2) for i in range(8)])
        event.listen(TrialModel, "load", loaded)
        try:
            trials = open_study(storage, "a", direction="minimize").trials
        finally:
            event.remove(TrialModel, "load", loaded)
        whole = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
        optunas = optuna.load_study(study_name="a", storage=whole).trials
        whole.remove_session()
        whole.engine.dispose()

    assert trials == optunas
    assert max(at_once) == 3
    for name in ("x", "k", "method"):
        assert len({id(trial.distributions[name]) for trial in trials}) == 1


def test_from_the_second_trial_on_all_is_written_together(tmp_path):
    with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
        study = open_study(storage, "a", direction="minimize")
        study.add_trial(finished(0))
        statements = []
        event.listen(
            storage.engine, "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        study.add_trial(finished(1))

    assert len(statements) <= 12


def test_a_parameter_of_another_kind_is_refused_as_by_optuna(tmp_path):
    with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
        study = open_study(storage, "a", direction="minimize")
        study.add_trials([finished(0), finished(1)])
        odd = create_trial(
            value=1.0, params={"x": 3}, distributions={"x": CategoricalDistribution((3, 4))}
        )
        with pytest.raises(ValueError, match="distribution"):
            study.add_trial(odd)
        study.add_trial(finished(2))

        assert [t.number for t in study.trials] == [0, 1, 2]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "'study.db' is not a database URL. Write sqlite:///study.db"),
        ("nosuch://x/y", "is not a database URL"),
        ("nosuch://me:secret@x/y", r"'\*\*\*@x/y' is not a database URL"),
        ("sqlite://", "a database in memory, which keeps nothing"),
        ("sqlite:////no/such/folder/study.db", "the folder /no/such/folder does not exist"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_way_out(url, message):
    with pytest.raises(StorageError, match=message), open_storage(url):
        pass


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, dear to me, and long enough to be no database header " * 10)
    before = path.read_bytes()

    with pytest.raises(StorageError, match="not a database"), open_storage(f"sqlite:///{path}"):
        pass
    assert path.read_bytes() == before


@pytest.fixture
def older(tmp_path):
    """A database whose tables are those of an Optuna before 3.2, with a study."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with open_storage(url) as storage:
        open_study(storage, "a", direction="minimize")
    execute(
        url, "DROP INDEX ix_trials_study_id; UPDATE alembic_version SET version_num = 'v3.0.0.d'"
    )
    return url


def execute(url, script):
    """Do something to a SQLite file behind everybody's back."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.executescript(script)


def test_they_are_refused_with_the_way_out_which_leaves_the_studies_as_they_are(older):
    with (
        pytest.raises(StorageError, match=r"version v3\.0\.0\.d,.*`optuna storage upgrade"),
        open_storage(older),
    ):
        pass
    with open_storage(older, upgrade=True) as storage:
        names = [study.study_name for study in storage.get_all_studies()]
    with open_storage(older) as storage:
        again = [study.study_name for study in storage.get_all_studies()]

    assert names == again == ["a"]
    # Those of a newer one are never touched.
    execute(older, "UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    before = Path(older.removeprefix("sqlite:///")).read_bytes()
    said = r"version v9\.0\.0\.a, .*Install the newer Optuna"
    for upgrade in (False, True):
        with pytest.raises(StorageError, match=said), open_storage(older, upgrade=upgrade):
            pass
    assert Path(older.removeprefix("sqlite:///")).read_bytes() == before
