"""
`pho.objective`, `pho.configuration` and `pho.baseline`: parts for a search of one's own.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from pho_service.errors import InvalidInput, StudyError
from pho_service.interface.inputs import opened_bundle, parsed
from pho_service.interface.search import (
    Given,
    LinearArguments,
    MethodArguments,
    arguments,
    check_bundle_of,
    check_study_is_of,
    plain_bundle,
)
from pho_service.pipeline.objectives import rate_by_proxy
from pho_service.pipeline.search import check_study, search_plan
from pho_service.pipeline.work import Work
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.configuration import Configuration, published
from pho_service.spec.objective import OBJECTIVES, SAMPLERS, WEIGHTINGS, Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import Evaluate, SearchPlan, SearchRequest
from pho_service.tuning.result import chosen_in, describe_study, search_result
from pho_service.tuning.search import ranked
from storage.studies import record_of


class ProxyObjective:
    """
    Rates a trial of any study of Optuna on a bundle: ``study.optimize(ProxyObjective(...))``.

    It suggests the parameters that `pho search` searches, and keeps with each trial what that
    keeps. It can be pickled, and called by several threads, which take turns.

    Args:
        bundle: What to rate on.
        request: What is asked.
        device: Where candidates are rated.
    """

    def __init__(self, bundle: ProxyBundle, request: SearchRequest, device: str = "cpu") -> None:
        self.bundle = plain_bundle(bundle)
        self.request = request
        self.device = device
        self.plan: SearchPlan = search_plan(request, {"the bundle": self.bundle})
        self._ready()

    def _ready(self) -> None:
        self._lock = threading.Lock()
        self._evaluate: Evaluate | None = None
        self._known: set[tuple[int, int]] = set()  # studies that were looked at

    def __getstate__(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle, "request": self.request, "device": self.device, "plan": self.plan
        }  # fmt: skip

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._ready()

    def __repr__(self) -> str:
        return (
            f"<{self.request.objective.label} of {self.plan.pattern} in scope "
            f"{self.plan.pattern.scope.value} on bundle {self.bundle.key[:12]}>"
        )

    def __call__(self, trial: optuna.Trial) -> float:
        """
        The value of a trial; NaN, which fails it, where a rating is not finite.

        Raises:
            StudyError: The study is of another search or bundle, or for the other direction.
        """
        with self._lock:
            self._look_at(trial.study)
        params = {
            name: _suggested(trial, name, distribution)
            for name, distribution in self.plan.space.distributions().items()
        }
        candidate = self.plan.space.candidate(params, self.plan.pattern, self.plan.steps)
        with self._lock:
            if self._evaluate is None:
                evaluator = ProxyEvaluator(self.bundle, self.device)
                self._evaluate = rate_by_proxy(evaluator, self.request.objective)
            (outcome,) = self._evaluate([candidate])
        attributes = {**candidate.to_dict(), **outcome.attributes}
        if outcome.failure:
            attributes["failure"] = outcome.failure
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        return math.nan if outcome.value is None else outcome.value

    def _look_at(self, study: optuna.Study) -> None:
        """See once that a study is for this, and note in a new one what it is a record of."""
        study_key = (id(study._storage), study._study_id)
        if study_key in self._known:
            return
        directions = [direction.name.lower() for direction in study.directions]
        if directions != [self.plan.direction]:
            raise StudyError(
                f"study {study.study_name!r} is to {' and '.join(directions)} its values, and "
                f"{self.request.objective.label} is to be {self.plan.direction}d. Create it with "
                f"direction={self.plan.direction!r}."
            )
        if "pattern" in study.user_attrs or len(study.get_trials(deepcopy=False)) > 1:
            check_study_is_of(study, Work.of(self.bundle), self.request)
        check_study(study, [self.bundle])
        plan = replace(self.plan, sampler=study.sampler)
        describe_study(study, self.request, plan, self.bundle.origin)
        self._known.add(study_key)


def _suggested(trial: optuna.Trial, name: str, distribution: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high)


@dataclass(frozen=True, kw_only=True)
class ObjectiveArguments(MethodArguments):
    """
    Arguments of ``pho.objective``.

    Attributes:
        bundle: What ``pho.calibrate`` gave, or the path of its file.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        device: Where candidates are rated.
    """

    bundle: Given = field(kw_only=False)
    pattern: str | float | Pattern = field(kw_only=False)
    device: str = "cpu"


@arguments(ObjectiveArguments)
def objective(ask: ObjectiveArguments) -> ProxyObjective:
    """
    Give a plain objective for a study of Optuna: any sampler, storage and number of processes.

    A search of one's own has no baselines among its trials, and nothing is confirmed;
    ``pho.configuration`` gives its best trial as a configuration, and ``pho.compare`` compares it.

    Raises:
        InvalidInput: An option breaks a rule.
        BundleError: The bundle cannot be read.
    """
    if ask.objective == "perplexity" or callable(ask.objective):
        raise InvalidInput(
            f"the objective {ask.objective!r} needs a model or is a function, and this one rates "
            "by a proxy of a bundle. Use pho.search(..., objective=...)."
        )
    bundle = opened_bundle(ask.bundle)
    return ProxyObjective(bundle, ask.request(ask.pattern), ask.device)


def configuration(study: optuna.Study, bundle: Given) -> Configuration:
    """
    Give the configuration of a study's best trial, to write, compare or prune with.

    In a study of ``pho.search`` or `pho search` it is the trial that was chosen by perplexity, if
    one was.

    Args:
        study: That ``pho.objective`` or ``pho.search`` rated the trials of.
        bundle: The same bundle.

    Raises:
        StudyError: The study is of another bundle, was not made by PHO, or has no finished trial.
    """
    proxy_bundle = opened_bundle(bundle)
    record = record_of(study)
    if "pattern" not in record or "space" not in record:
        raise StudyError(
            f"study {study.study_name!r} was not made by pho.objective or pho.search, so its "
            "trials are not candidates."
        )
    check_bundle_of(study, Work.of(proxy_bundle))
    check_study(study, [proxy_bundle])
    request = SearchRequest(
        pattern=Pattern.parse(record["pattern"], record["scope"]),
        objective=_objective_of(study),
        bounds=_bounds(record["space"]),
        steps=Steps.from_dict(record["steps"]),
        sampler=study.sampler,
    )
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    plan = request.plan(proxy_bundle.kernel_sizes)
    plan = replace(plan, trials=max([plan.trials, *(t.number + 1 for t in trials)]))
    rated = ranked(study, plan)
    chosen = chosen_in(study)
    rated.sort(key=lambda candidate: candidate.number != chosen)  # stable: the best first otherwise
    result = search_result(request, plan, proxy_bundle.origin, study.study_name, rated, [], None)
    search = {
        **result.configuration.search,
        "sampler": record["sampler"],
        "trials": len(trials),
        "seed": record["seed"],
    }
    if record["sampler"] not in SAMPLERS:  # an object, whose seed nobody knows
        del search["seed"]
    return result.configuration.model_copy(update={"search": search})


def _bounds(space: Mapping[str, Any]) -> dict[str, Any]:
    fields = SearchSpace.__dataclass_fields__
    return {name: tuple(values) for name, values in space.items() if name in fields}


def _objective_of(study: optuna.Study) -> Objective:
    label = study.user_attrs.get("objective")
    objectives = (
        Objective(name=name, weighting=weighting) for name in OBJECTIVES for weighting in WEIGHTINGS
    )
    for objective in objectives:
        if objective.label == label:
            return objective
    raise StudyError(
        f"study {study.study_name!r} is rated by {label}, which a single bundle does not know. "
        "Use the configuration that its search gave."
    )


@dataclass(frozen=True, kw_only=True)
class BaselineArguments(LinearArguments):
    """
    Arguments of ``pho.baseline``.

    Attributes:
        method: Its name in `pho compare`: ``wanda``, ``ria-row-sequential``,
            ``sparsegpt-permuted``. A name that is not known is refused with all that are.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        scope: None is the method's own; ``crepe-equal`` takes ``row``, ``layer`` or ``global``.
    """

    method: str = field(kw_only=False)
    pattern: str | float | Pattern = field(kw_only=False)
    scope: str | None = None


@arguments(BaselineArguments)
def baseline(ask: BaselineArguments) -> Configuration:
    """
    Give the configuration that prunes as a published method does, as `pho prune --method NAME`.

    It is taken wherever one that was found is: ``pho.prune(model, pho.baseline("wanda", "2:4"),
    bundle)``.

    Raises:
        InvalidInput: The method is not known, not defined in this pattern, or has another scope.
    """
    pattern = parsed(ask.pattern, ask.scope)
    return published(ask.method, pattern, ask.scope, ask.linears)
