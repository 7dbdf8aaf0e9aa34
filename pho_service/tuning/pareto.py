"""
The trials of a curve as one study of two objectives: sparsity and what a search minimised.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.progress import Fence
from pho_service.tuning.plan import Direction
from storage.studies import quiet_optuna

_OF = "of_study"  # user attribute of a trial: where it was searched
_KEPT = ("method", "coefficients", "steps", "perplexity", "divergence")
_AT_ONCE = 100  # trials that are written within one fence: about half a second


def pareto_name(model: str, studies: Sequence[str]) -> str:
    """What the study of a curve is called: the same studies give the same one."""
    digest = hashlib.sha256(json.dumps(sorted(studies)).encode()).hexdigest()[:10]
    return f"{model} curve of sparsities {digest}"


def pareto_study(
    name: str, direction: Direction, objective: str, storage: BaseStorage | None
) -> optuna.Study:
    """
    Make or open a study of (sparsity, objective), whose Pareto front optuna-dashboard draws.

    Args:
        name: Name of the study.
        direction: Direction of the objective; sparsity is maximised.
        objective: What it is called.
        storage: Where; None keeps it in memory.
    """
    with quiet_optuna(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", direction],
            load_if_exists=True,
        )  # fmt: skip
        if study.metric_names is None:
            study.set_metric_names(["sparsity", objective])
    return study


def add_point(
    pareto: optuna.Study,
    study: optuna.Study,
    sparsity: float,
    pattern: str,
    fence: Fence = nullcontext,
) -> None:
    """
    Add the trials of a search to the study of its curve; those that are there are left out.

    Args:
        pareto: Pareto study of the curve.
        study: Study of the search.
        sparsity: Sparsity of its pattern.
        pattern: It, as text.
        fence: Entered around the writes. One that lets in a single writer of ``study``, whoever
            writes other points of the curve meanwhile, keeps each trial from being added twice.
    """
    known = {
        (trial.user_attrs.get(_OF), trial.user_attrs.get("trial"))
        for trial in pareto.get_trials(deepcopy=False)
    }
    points = [
        _point(trial, study.study_name, (sparsity, trial.value), pattern)
        for trial in study.get_trials(deepcopy=False)
        if trial.value is not None and (study.study_name, trial.number) not in known
    ]
    for first in range(0, len(points), _AT_ONCE):
        with fence():
            pareto.add_trials(points[first : first + _AT_ONCE])


def _point(
    trial: FrozenTrial, study: str, values: tuple[float, float], pattern: str
) -> FrozenTrial:
    kept = {name: trial.user_attrs[name] for name in _KEPT if name in trial.user_attrs}
    point = create_trial(
        state=TrialState.COMPLETE,
        values=values,
        user_attrs={"pattern": pattern, _OF: study, "trial": trial.number, **kept},
    )
    point.datetime_start, point.datetime_complete = trial.datetime_start, trial.datetime_complete
    return point
