"""
Optuna studies as the record of searches, and their trials a page at a time.
"""

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    Connection,
    Engine,
    Integer,
    String,
    column,
    delete,
    event,
    func,
    insert,
    select,
    text,
    values,
)
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

_PAGE = 500  # trials that are read at once
_NO_ID = 2**31 - 1  # which no trial's number in the database exceeds
_RECORD = "pho:"  # begins the names of the system attributes that are ours


class StorageError(Exception):
    """The database of a study cannot be opened, read or written."""


class DatabaseGone(StorageError):
    """The database cannot be reached; trying again later may help."""


class DatabaseFull(DatabaseGone):
    """The database's disk is full; trying again helps when somebody has made room."""


class StudyStorage(RDBStorage):
    """Optuna's storage; a finished trial is written in a dozen statements instead of fifty."""

    # Optuna looks the trial and its study up again for every parameter and every attribute, which
    # takes more time than rating a candidate does. Trials that have the parameters of the one
    # before them are written at once here; the first of a study, and all that is out of the
    # ordinary, by Optuna itself.
    #
    # Optuna reads all trials of a study at once, with an object for every parameter and attribute:
    # 40 KiB a trial, which the process keeps. They are read a page at a time here.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._written: dict[int, dict[str, str]] = {}  # distributions by study
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if "scoped_session" in self.__dict__:  # made with the engine
                self.scoped_session.remove()
                end_connections(self.engine)
            raise

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        template = template_trial
        if template is None or not _ordinary(template):
            return super()._get_prepared_new_trial(study_id, template, session)
        distributions = {n: distribution_to_json(d) for n, d in template.distributions.items()}
        if self._written.get(study_id) != distributions:
            trial = super()._get_prepared_new_trial(study_id, template, session)
            self._written[study_id] = distributions
            return trial
        trial = models.TrialModel(
            study_id=study_id,
            number=None,
            state=template.state,
            datetime_start=template.datetime_start,
            datetime_complete=template.datetime_complete,
        )
        session.add(trial)
        session.flush()  # gives it its id
        trial_key = {"trial_id": trial.trial_id}
        for objective, value in enumerate(template.values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            session.add(
                models.TrialValueModel(
                    **trial_key, objective=objective, value=stored, value_type=kind
                )
            )
        # As objects, not as one list to execute: psycopg sends a list as a pipeline, in which
        # PostgreSQL does not notice that a worker has frozen in the midst of its transaction.
        session.add_all(
            models.TrialParamModel(
                **trial_key,
                param_name=name,
                param_value=template.distributions[name].to_internal_repr(value),
                distribution_json=distributions[name],
            )
            for name, value in template.params.items()
        )
        session.add_all(
            models.TrialUserAttributeModel(**trial_key, key=key, value_json=json.dumps(value))
            for key, value in template.user_attrs.items()
        )
        trial.number = trial.count_past_trials(session)
        return trial

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        column = models.TrialModel.trial_id
        newer = select(column).where(
            models.TrialModel.study_id == study_id, column > trial_id_greater_than
        )
        with _create_scoped_session(self.scoped_session) as session:
            models.StudyModel.find_or_raise_by_id(study_id, session)
            ids = sorted({*included_trial_ids, *session.execute(newer).scalars()})
        distributions: dict[str, BaseDistribution] = {}
        trials = []
        for first in range(0, len(ids), _PAGE):
            page = {*ids[first : first + _PAGE]}
            for trial in super()._get_trials(study_id, states, page, _NO_ID):
                for name, value in trial.distributions.items():  # one of a kind for all trials
                    trial.distributions[name] = distributions.setdefault(repr(value), value)
                trials.append(trial)
        return trials


def _ordinary(trial: FrozenTrial) -> bool:
    """Finished, with nothing but values, parameters and user attributes."""
    odd = trial.system_attrs or trial.intermediate_values
    return trial.state.is_finished() and not odd


@contextmanager
def open_storage(url: str, *, upgrade: bool = False) -> Iterator[RDBStorage]:
    """Open Optuna's storage, and close its connections afterwards."""
    # SQLite files are put into write-ahead logging: a commit is about seven times faster there, and
    # still survives a killed process.
    check_url(url)
    try:
        storage = StudyStorage(url, skip_compatibility_check=True)  # ours says what to do
        try:
            _check_version(storage, upgrade=upgrade)
            event.listen(storage.engine, "handle_error", give_up)
            if storage.engine.dialect.name == "sqlite":
                event.listen(storage.engine, "connect", _set_pragmas)
                storage.engine.dispose()  # the connections made so far lack the settings
            yield storage
        finally:
            storage.remove_session()
            end_connections(storage.engine)
    except ImportError as error:
        raise StorageError(f"the driver of {url} is not installed: {error}") from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        kind = DatabaseGone if isinstance(cause, OperationalError) else StorageError
        raise kind(f"the database fails: {reason}. What it holds is kept.") from error


def _check_version(storage: RDBStorage, *, upgrade: bool) -> None:
    version, versions = storage.get_current_version(), known_versions()
    own_version = versions[0]
    if version == own_version:
        return
    is_older = version in versions
    if is_older and upgrade:
        storage.upgrade()
        return
    way_out = (
        "`optuna storage upgrade --storage URL` brings them there, and `pho serve` a service's."
        if is_older
        else "Install the newer Optuna that made them, or give another database."
    )
    raise StorageError(
        f"the studies are in tables of Optuna's version {version}, and Optuna "
        f"{optuna.__version__}, which is installed, needs {own_version}. {way_out} What they hold "
        "is kept."
    )


@cache  # Optuna reads all of its migrations for it, which takes longer than a stage may
def known_versions() -> Sequence[str]:
    """Return the versions of Optuna's tables that the installed one can upgrade, its own first."""
    storage = RDBStorage("sqlite://")
    try:
        return storage.get_all_versions()
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def written_on(storage: RDBStorage, connection: Connection) -> Iterator[None]:
    """Have Optuna write in the transaction of ``connection``, to its own schema."""
    connection.execute(text("SET LOCAL search_path TO optuna"))  # ours are named in full
    sessions = storage.scoped_session
    sessions.remove()
    sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
    try:
        yield
    finally:
        sessions.remove()
        sessions.configure(bind=storage.engine, join_transaction_mode="conditional_savepoint")


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's line on each study that is made; its verbosity is the caller's after."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(
    storage: RDBStorage | None, name: str, *, direction: Literal["minimize", "maximize"]
) -> optuna.Study:
    """Create a study, or open it if it is there; without a storage one in memory."""
    with quiet_optuna():
        return optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=True
        )


def marked_alike(study: optuna.Study, key: str, value: str) -> list[str]:
    """The names of the other studies of a study's database with the same record, oldest first."""
    storage = _database(study)
    if storage is None:
        return []
    mark = models.StudySystemAttributeModel
    marked = select(mark.study_id).where(
        mark.key == f"{_RECORD}{key}", mark.value_json == json.dumps(value)
    )
    query = (
        select(models.StudyModel.study_name)
        .where(models.StudyModel.study_id.in_(marked))
        .where(models.StudyModel.study_id != study._study_id)
        .order_by(models.StudyModel.study_id)
    )
    with _create_scoped_session(storage.scoped_session) as session:
        return [*session.execute(query).scalars()]


def _database(study: optuna.Study) -> RDBStorage | None:
    """The database of a study, beneath Optuna's cache; None if it is elsewhere."""
    storage = getattr(study._storage, "_backend", study._storage)
    return storage if isinstance(storage, RDBStorage) else None


def record_of(study: optuna.Study) -> dict[str, Any]:
    """What a study holds beside its trials, by name: :func:`keep_record`'s and user attributes."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    records = {k.removeprefix(_RECORD): v for k, v in attributes.items() if k.startswith(_RECORD)}
    return {**study.user_attrs, **records}


def all_records(storage: RDBStorage) -> Iterator[dict[str, Any]]:
    """What each study of a storage holds beside its trials, the newest first."""
    for study in reversed(storage.get_all_studies()):
        records = {k.removeprefix(_RECORD): v for k, v in study.system_attrs.items()}
        yield {**study.user_attrs, **records}


def keep_record(study: optuna.Study, key: str, value: Any) -> None:
    """Keep in a study what a search goes on with, and nobody has to read."""
    # It is a system attribute: Optuna's own tools list user attributes, and would show documents.
    study._storage.set_study_system_attr(study._study_id, f"{_RECORD}{key}", value)


def kept(study: optuna.Study, key: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a study's record of this name holds, if it is about this; nothing if it is not."""
    stored: dict[str, Any] = _record(study, f"{_RECORD}{key}") or {}
    return stored if about.items() <= stored.items() else {}


def _record(study: optuna.Study, name: str) -> Any:
    """One system attribute: of a database alone, as a long search has some thousand."""
    storage = _database(study)
    if storage is None:
        return study._storage.get_study_system_attrs(study._study_id).get(name)
    mark = models.StudySystemAttributeModel
    query = select(mark.value_json).where(mark.study_id == study._study_id, mark.key == name)
    with _create_scoped_session(storage.scoped_session) as session:
        stored = session.execute(query).scalar()
    return None if stored is None else json.loads(stored)


def once(
    study: optuna.Study,
    key: str,
    about: Mapping[str, Any],
    make: Callable[[], Mapping[str, Any]],
    *,
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
    note: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """Return what a study's record of this name holds; if not about this, make and keep it."""
    record = kept(study, key, about)
    if not record:
        record = {**make(), **about}
        with fence():
            if note is not None:
                note_trial(study, *note, record[note[1]])
            keep_record(study, key, record)  # last: with it nothing is made again
    return record


def note_trial(study: optuna.Study, number: int, key: str, value: Any) -> None:
    """Keep a user attribute of a trial that has ended, which Optuna's own methods refuse."""
    # In databases and in memory; of another storage this process alone sees it.
    storage = _database(study)
    if storage is not None:
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        with _create_scoped_session(storage.scoped_session) as session:
            session.execute(
                delete(models.TrialUserAttributeModel).filter_by(trial_id=trial_id, key=key)
            )
            session.add(
                models.TrialUserAttributeModel(
                    trial_id=trial_id, key=key, value_json=json.dumps(value)
                )
            )
    if storage is not study._storage:
        for trial in study.get_trials(deepcopy=False):  # those that memory holds
            if trial.number == number:
                trial.set_user_attr(key, value)


def study_name(job_name: str, island: int) -> str:
    """The study of a job's island: the first has the job's name."""
    return job_name if island == 0 else f"{job_name} island {island}"


def pareto_study_name(job_name: str) -> str:
    """The study of sparsity and objective that has the trials of all patterns of a job."""
    return f"{job_name} Pareto front"


def study_ids(connection: Connection, names: Sequence[str]) -> dict[str, int]:
    """The numbers of a service's studies in optuna-dashboard; one that has not begun has none."""
    query = text("SELECT study_name, study_id FROM optuna.studies WHERE study_name = ANY(:names)")
    return {row.study_name: row.study_id for row in connection.execute(query, {"names": [*names]})}


def give_up(context: ExceptionContext) -> None:
    """Let nothing be tried again on another connection."""
    # Optuna does, and would number a trial again after a server that crashed has forgotten those
    # before it.
    if context.is_disconnect and not context.is_pre_ping:
        reason = str(context.original_exception).splitlines()[0]
        raise DatabaseGone(f"the database went away: {reason}. What it holds is kept.")


def end_connections(engine: Engine) -> None:
    """Close the connections of an engine, those in use once they are given back."""
    # ``Engine.dispose`` alone forgets those that other threads are using, and nobody closes them.
    event.listen(engine, "checkin", lambda _, record: record.invalidate())
    engine.dispose()


def _set_pragmas(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]  # a DBAPI connection
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def check_url(url: str) -> None:
    hint = "Write sqlite:///study.db for a file in this folder."
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        _, separator, rest = url.rpartition("@")
        shown_url = f"***@{rest}" if separator else url  # what is misspelt may hold a password
        raise StorageError(f"{shown_url!r} is not a database URL. {hint}") from None
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise StorageError(f"{url} is a database in memory, which keeps nothing. {hint}")
        folder = Path(str(parsed.database)).resolve().parent
        if not folder.is_dir():
            raise StorageError(f"the folder {folder} does not exist. Make it first.")


_TRIALS = models.TrialModel.__table__
_STUDIES = models.StudyModel.__table__
_VALUES = models.TrialValueModel.__table__
_PARAMS = models.TrialParamModel.__table__
_DIRECTIONS = models.StudyDirectionModel.__table__
_RECORDS = models.StudySystemAttributeModel.__table__
_ATTRIBUTES = models.TrialUserAttributeModel.__table__
_IN_SCHEMA = {"schema_translate_map": {None: "optuna"}}


def read_record(connection: Connection, study_name: str, key: str) -> Any:
    """What a study of a service has by :func:`keep_record`; None if there is nothing."""
    query = (
        select(_RECORDS.c.value_json)
        .join(_STUDIES, _STUDIES.c.study_id == _RECORDS.c.study_id)
        .where(_STUDIES.c.study_name == study_name, _RECORDS.c.key == f"{_RECORD}{key}")
    )
    value = connection.execute(query, execution_options=_IN_SCHEMA).scalar()
    return None if value is None else json.loads(value)


def begin_study(
    connection: Connection,
    name: str,
    trials: Sequence[FrozenTrial],
    *,
    direction: Literal["minimize", "maximize"],
    records: Mapping[str, Any],
) -> None:
    """Make a study of a service that holds trials with values, as ``add_trials`` writes them."""
    # In the transaction of whoever asks, and a statement for each table: Optuna takes 50 ms a
    # trial.

    def write(table: Any, rows: Sequence[Mapping[str, Any]], *returned: Any) -> Any:
        query: Any = insert(table)
        if returned:
            query = query.returning(*returned, sort_by_parameter_order=True)
        return connection.execute(query, rows, execution_options=_IN_SCHEMA)

    study_id = write(_STUDIES, [{"study_name": name}], _STUDIES.c.study_id).scalar_one()
    study = {"study_id": study_id}
    write(_DIRECTIONS, [{**study, "direction": StudyDirection[direction.upper()], "objective": 0}])
    texts = [(f"{_RECORD}{key}", json.dumps(value)) for key, value in records.items()]
    write(_RECORDS, [{**study, "key": key, "value_json": text} for key, text in texts])
    times = ("datetime_start", "datetime_complete")
    rows = [
        {**study, "number": n, "state": t.state, **{time: getattr(t, time) for time in times}}
        for n, t in enumerate(trials)
    ]
    ids = [{"trial_id": row.trial_id} for row in write(_TRIALS, rows, _TRIALS.c.trial_id)]
    written = [*zip(ids, trials, strict=True)]
    value = {"objective": 0, "value_type": models.TrialValueModel.TrialValueType.FINITE}
    write(_VALUES, [{**i, **value, "value": t.value} for i, t in written])
    distributions = trials[0].distributions  # the same of all
    kinds = {
        param: {"param_name": param, "distribution_json": distribution_to_json(kind)}
        for param, kind in distributions.items()
    }
    write(
        _PARAMS,
        [
            {**i, **kinds[param], "param_value": distributions[param].to_internal_repr(value)}
            for i, t in written
            for param, value in t.params.items()
        ],
    )
    attributes = [(i, pair) for i, t in written for pair in t.user_attrs.items()]
    write(_ATTRIBUTES, [{**i, "key": k, "value_json": json.dumps(v)} for i, (k, v) in attributes])


def read_trials(
    connection: Connection,
    study_name: str,
    *,
    first: int = 0,
    limit: int | None = None,
    attributes: Sequence[str] | None = None,
    params: bool = True,
) -> list[FrozenTrial]:
    """Trials of a study with one objective, by number."""

    def rows(query: Any) -> Any:
        return connection.execute(query, execution_options=_IN_SCHEMA)

    query = (
        select(
            _TRIALS.c.trial_id, _TRIALS.c.number, _TRIALS.c.state, _TRIALS.c.datetime_start,
            _TRIALS.c.datetime_complete,
        )
        .join(_STUDIES, _STUDIES.c.study_id == _TRIALS.c.study_id)
        .where(_STUDIES.c.study_name == study_name, _TRIALS.c.number >= first)
        .order_by(_TRIALS.c.number)
        .limit(limit)
    )  # fmt: skip
    trials = {
        row.trial_id: FrozenTrial(
            number=row.number, state=row.state, value=None, datetime_start=row.datetime_start,
            datetime_complete=row.datetime_complete, params={}, distributions={}, user_attrs={},
            system_attrs={}, intermediate_values={}, trial_id=row.trial_id,
        )
        for row in rows(query)
    }  # fmt: skip
    # A trial that is added while these statements run is in the later ones alone.
    last = max((trial.number for trial in trials.values()), default=-1)
    ids = query.where(_TRIALS.c.number <= last).with_only_columns(_TRIALS.c.trial_id).subquery()
    for row in rows(select(_VALUES).join(ids, ids.c.trial_id == _VALUES.c.trial_id)):
        value = models.TrialValueModel.stored_repr_to_value(row.value, row.value_type)
        trials[row.trial_id].value = value
    distributions: dict[str, BaseDistribution] = {}
    params_query = select(_PARAMS).join(ids, ids.c.trial_id == _PARAMS.c.trial_id)
    for row in rows(params_query) if params else ():
        if row.distribution_json not in distributions:
            distributions[row.distribution_json] = json_to_distribution(row.distribution_json)
        distribution = distributions[row.distribution_json]
        trial = trials[row.trial_id]
        trial.distributions[row.param_name] = distribution
        trial.params[row.param_name] = distribution.to_external_repr(row.param_value)
    attributes_query = select(_ATTRIBUTES).join(ids, ids.c.trial_id == _ATTRIBUTES.c.trial_id)
    if attributes is not None:
        attributes_query = attributes_query.where(_ATTRIBUTES.c.key.in_(attributes))
    for row in rows(attributes_query):
        trials[row.trial_id].user_attrs[row.key] = json.loads(row.value_json)
    return [*trials.values()]


def read_course(
    connection: Connection, sizes: Mapping[str, int]
) -> list[tuple[str, int, float, float]]:
    """How several searches went, in a few values each."""
    if not sizes:
        return []
    names, size = column("name", String), column("size", Integer)
    searches = values(names, size, name="given").data([*sizes.items()])
    place = (_TRIALS.c.number // searches.c.size).label("place")
    value = _VALUES.c.value
    query = (
        select(searches.c.name, place, func.min(value), func.max(value))
        .join(_STUDIES, _STUDIES.c.study_name == searches.c.name)
        .join(_TRIALS, _TRIALS.c.study_id == _STUDIES.c.study_id)
        .join(_VALUES, _VALUES.c.trial_id == _TRIALS.c.trial_id)
        .where(
            _TRIALS.c.state == TrialState.COMPLETE,
            _VALUES.c.value_type == models.TrialValueModel.TrialValueType.FINITE,
        )
        .group_by(searches.c.name, place)
        .order_by(searches.c.name, place)
    )
    rows = connection.execute(query, execution_options=_IN_SCHEMA)
    return [(row[0], row[1], row[2], row[3]) for row in rows]
