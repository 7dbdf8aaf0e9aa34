"""
Trials of a service's studies, read in a few statements: a page of them, or all.

Optuna reads whole studies, with everything that any trial has.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Integer, String, column, func, select, values

_TRIALS = models.TrialModel.__table__
_STUDIES = models.StudyModel.__table__
_VALUES = models.TrialValueModel.__table__
_PARAMS = models.TrialParamModel.__table__
_ATTRIBUTES = models.TrialUserAttributeModel.__table__
_IN_SCHEMA = {"schema_translate_map": {None: "optuna"}}


def read_trials(
    connection: Connection,
    study_name: str,
    *,
    first: int = 0,
    limit: int | None = None,
    attributes: Sequence[str] | None = None,
    params: bool = True,
) -> list[FrozenTrial]:
    """
    Trials of a study with one objective, by number.

    Args:
        connection: To the database of a service.
        study_name: Name of the study; one that is not there has no trials.
        first: The first number.
        limit: At most so many.
        attributes: User attributes that are wanted; None wants all.
        params: Whether parameters are wanted.
    """

    def rows(query: Any) -> Any:
        return connection.execute(query, execution_options=_IN_SCHEMA)

    wanted = (
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
        for row in rows(wanted)
    }  # fmt: skip
    ids = wanted.with_only_columns(_TRIALS.c.trial_id).subquery()
    for row in rows(select(_VALUES).join(ids, ids.c.trial_id == _VALUES.c.trial_id)):
        value = models.TrialValueModel.stored_repr_to_value(row.value, row.value_type)
        trials[row.trial_id].value = value
    known: dict[str, BaseDistribution] = {}
    of_params = select(_PARAMS).join(ids, ids.c.trial_id == _PARAMS.c.trial_id)
    for row in rows(of_params) if params else ():
        if row.distribution_json not in known:
            known[row.distribution_json] = json_to_distribution(row.distribution_json)
        distribution = known[row.distribution_json]
        trial = trials[row.trial_id]
        trial.distributions[row.param_name] = distribution
        trial.params[row.param_name] = distribution.to_external_repr(row.param_value)
    of_attributes = select(_ATTRIBUTES).join(ids, ids.c.trial_id == _ATTRIBUTES.c.trial_id)
    if attributes is not None:
        of_attributes = of_attributes.where(_ATTRIBUTES.c.key.in_(attributes))
    for row in rows(of_attributes):
        trials[row.trial_id].user_attrs[row.key] = json.loads(row.value_json)
    return [*trials.values()]


def read_course(
    connection: Connection, sizes: Mapping[str, int]
) -> list[tuple[str, int, float, float]]:
    """
    How several searches went, in a few values each.

    Args:
        connection: To the database of a service.
        sizes: How many trials make one value, by the names of studies. Those that are not there
            have no values.

    Returns:
        The name of a study, the place of a run of trials in it, and the lowest and the highest
        finite value of its finished trials; by name and place.
    """
    if not sizes:
        return []
    names, size = column("name", String), column("size", Integer)
    given = values(names, size, name="given").data([*sizes.items()])
    place = (_TRIALS.c.number // given.c.size).label("place")
    value = _VALUES.c.value
    query = (
        select(given.c.name, place, func.min(value), func.max(value))
        .join(_STUDIES, _STUDIES.c.study_name == given.c.name)
        .join(_TRIALS, _TRIALS.c.study_id == _STUDIES.c.study_id)
        .join(_VALUES, _VALUES.c.trial_id == _TRIALS.c.trial_id)
        .where(
            _TRIALS.c.state == TrialState.COMPLETE,
            _VALUES.c.value_type == models.TrialValueModel.TrialValueType.FINITE,
        )
        .group_by(given.c.name, place)
        .order_by(given.c.name, place)
    )
    rows = connection.execute(query, execution_options=_IN_SCHEMA)
    return [(row[0], row[1], row[2], row[3]) for row in rows]
