"""
What candidates of a search are rated by: proxies on bundles, perplexity, known ratings.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import optuna
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError, StudyError, field_name, shown
from pho_service.pipeline.work import Work, only_one
from pho_service.pruning.proxy import ProxyEvaluator, ProxyRating
from pho_service.spec.baselines import reference_methods
from pho_service.spec.document import number
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import (
    SECOND_OPINION,
    Evaluate,
    Outcome,
    SearchPlan,
    SearchRequest,
)
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import INHERITED, NOTES, RATINGS
from storage.studies import keep_record, marked_alike, record_of

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import ReportText


# Rate candidates by the proxy, on a bundle: no model is needed, and transformers is not loaded.
def proxy_value(rating: ProxyRating, objective: Objective) -> float:
    value = rating.gini if objective.name == "gini" else getattr(rating, objective.weighting)
    assert isinstance(value, float)
    return value


def mask_proxy(
    evaluator: ProxyEvaluator, candidate: Candidate, objective: Objective
) -> float | None:
    """A candidate's value, or None if its update chooses the mask, which no bundle knows."""
    if candidate.steps.chooses_mask:
        return None
    (rating,) = evaluator.evaluate([candidate], with_gini=objective.name == "gini")
    return proxy_value(rating, objective)


def rate_by_proxy(evaluator: ProxyEvaluator, objective: Objective) -> Evaluate:
    """A function for the search that rates candidates on a bundle."""

    def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
        started = time.perf_counter()
        try:
            ratings = evaluator.evaluate(candidates, with_gini=objective.name == "gini")
        except NumericalError as error:
            if len(candidates) == 1:
                return [Outcome(value=None, failure=str(error))]
            return [outcome for candidate in candidates for outcome in rate([candidate])]
        seconds = round((time.perf_counter() - started) / len(candidates), 5)
        second = objective.second_weighting
        return [
            Outcome(
                value=proxy_value(rating, objective),
                attributes={
                    "fisher": rating.fisher,
                    "relative": rating.relative,
                    "absolute": rating.absolute,
                    "error_by_kind": rating.error_by_kind,
                    "seconds": seconds,
                    **({} if second is None else {SECOND_OPINION: getattr(rating, second)}),
                },
            )
            for rating in ratings
        ]

    return rate


# Rate candidates by a function of the user's.
@dataclass(frozen=True, kw_only=True)
class OwnObjective(Objective):
    """
    A function of a candidate and its rating by the proxies, whose low values are good.

    If it has a third parameter, that is the model, pruned with the candidate.
    """

    name: Any = "own"
    function: Callable[..., float]

    def __post_init__(self) -> None:
        if self.over is not None:
            raise InvalidInput(f"the objective {self.name} rates on one bundle. Give one of them.")

    @classmethod
    def of(cls, function: Callable[..., float]) -> Self:
        return cls(name=f"own/{getattr(function, '__name__', 'function')}", function=function)

    def _number(self, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InvalidInput(
                f"the objective {self.name} gave {shown(value)} and not a number. Return one."
            ) from None

    def rate(
        self, evaluator: ProxyEvaluator, model: "LanguageModel | None", calibration: Tensor | None
    ) -> Evaluate:
        """A function for the search; by Optuna's rules a trial fails that gives NaN or raises."""
        with_model = len(signature(self.function).parameters) > 2
        if with_model and model is None:
            raise InvalidInput(
                f"the objective {self.name} takes a pruned model, and there is none. Give model=."
            )

        def value(candidate: Candidate) -> float:
            (rating,) = evaluator.evaluate([candidate], with_gini=True)
            if model is None or not with_model:
                return self._number(self.function(candidate, rating))
            from pho_service.pipeline.pipeline import pruned_model

            with pruned_model(model, evaluator.bundle.statistics(), candidate, calibration):
                return self._number(self.function(candidate, rating, model.model))

        def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
            outcomes: list[Outcome] = []
            for candidate in candidates:
                try:
                    objective_value = value(candidate)
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"
                    return [*outcomes, Outcome(value=None, failure=failure, raised=error)]
                nan = f"the objective {self.name} gave NaN" if math.isnan(objective_value) else None
                outcomes.append(Outcome(value=None if nan else objective_value, failure=nan))
            return outcomes

        return rate


# What makes a search over several models one: a candidate's value on all of them, and their
# origin.
def with_each_model(result: SearchResult, relative: Mapping[str, float]) -> SearchResult:
    """A joint search's result with its proxy on each model, RIA's being 1, and what to say."""
    objective = {**result.configuration.objective, "relative_to_ria": dict(relative)}
    worse = [
        f"On {model} the proxy of the result is {number(value)} times RIA's: it is good for the "
        "others only. Let the worst count instead of the mean (over), or leave that model out."
        for model, value in relative.items()
        if value >= 1
    ]
    return replace(
        result,
        configuration=result.configuration.model_copy(update={"objective": objective}),
        warnings=[*result.warnings, *worse],
    )


def rate_jointly(
    evaluators: Mapping[str, ProxyEvaluator],
    pattern: Pattern,
    objective: Objective,
    linears: Linears = Linears(),
) -> Evaluate:
    """A function for a search over several models."""
    ria = reference_methods(pattern, linears)["ria"]
    references = {}
    for name, evaluator in evaluators.items():
        (rating,) = evaluator.evaluate([ria])
        references[name] = proxy_value(rating, objective)
        if not references[name] > 0:
            raise NumericalError(f"{name}: the proxy of RIA is {references[name]}, no scale.")
    rates = {name: rate_by_proxy(evaluator, objective) for name, evaluator in evaluators.items()}

    def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
        outcomes = {name: rate(candidates) for name, rate in rates.items()}
        return [
            _joint({name: rated[i] for name, rated in outcomes.items()}, references, objective)
            for i in range(len(candidates))
        ]

    return rate


def _joint(
    outcomes: Mapping[str, Outcome], references: Mapping[str, float], objective: Objective
) -> Outcome:
    """One candidate's outcome on all models."""
    seconds = round(sum(o.attributes.get("seconds", 0.0) for o in outcomes.values()), 5)
    relative = {}
    for name, outcome in outcomes.items():
        if outcome.value is None:
            return Outcome(value=None, failure=f"{name}: {outcome.failure}")
        relative[name] = outcome.value / references[name]
    value = max(relative.values())
    if objective.over == "mean":
        value = sum(relative.values()) / len(relative)
    return Outcome(value=value, attributes={"relative_to_ria": relative, "seconds": seconds})


def joint_provenance(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """That of all bundles together, in the order in which they count."""
    keys = [provenance.get("key", "") for provenance in provenances]
    models = [provenance.get("model", {}) for provenance in provenances]
    names = [Path(model.get("name", "model")).name for model in models]
    return {
        "key": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        "model": {"name": " + ".join(names), "models": models},
        "bundles": [{k: v for k, v in p.items() if k != "model"} for p in provenances],
    }


def objective_function(
    objective: Objective,
    plan: SearchPlan,
    work: Work,
    device: str,
) -> Evaluate:
    """What a search rates candidates by: a proxy on one or several bundles, or perplexity."""
    if objective.over is not None:
        evaluators = {name: ProxyEvaluator(each, device) for name, each in work.bundles.items()}
        return rate_jointly(evaluators, plan.pattern, objective, plan.steps.linears)
    bundle = only_one(work.bundles, f"the objective {objective.name}")
    if isinstance(objective, OwnObjective):
        return objective.rate(ProxyEvaluator(bundle, device), work.dense, work.calibration)
    if objective.name != "perplexity":
        return rate_by_proxy(ProxyEvaluator(bundle, device), objective)
    if not work.measures:
        raise _needs_text()
    from pho_service.pipeline.rating import rate_by_perplexity

    windows = work.text.windows
    return rate_by_perplexity(work.model, bundle.statistics(), windows, work.calibration)


def rated_on(request: SearchRequest, text: "ReportText | None") -> str:
    """Hash of the text that candidates are rated on; empty if a proxy rates them."""
    if request.objective.name != "perplexity":
        return ""
    if text is None:
        raise _needs_text()
    return text.key


def _needs_text() -> InvalidInput:
    return InvalidInput(
        "the objective perplexity needs the model and a text to measure it on: give a model "
        f"instead of a bundle, and {field_name('confirm/text')}."
    )


# Ratings that another search has made of the same candidates.
_STUDIES = 3  # most that are read, the newest first


class KnownRatings:
    """What other studies of a storage hold; none for a search by perplexity, or in memory."""

    def __init__(
        self,
        study: optuna.Study,
        request: SearchRequest,
        plan: SearchPlan,
        bundles: Sequence[str],
    ) -> None:
        self.taken = 0
        self._known: dict[str, Outcome] = {}
        if isinstance(request.objective, OwnObjective):
            return  # it depends on what nobody knows
        mark = _mark(request, plan, bundles)
        record = record_of(study)
        if INHERITED in record and record.get(RATINGS) != mark:
            raise StudyError(
                f"the {record[INHERITED]['trials']} trials of job {record[INHERITED]['job']} that "
                "this fork begins with were rated on another model or text: a file has changed "
                "since. Clone the job instead, which takes no old value."
            )
        if RATINGS not in record:
            keep_record(study, RATINGS, mark)
        if request.objective.name == "perplexity":
            return  # which depends on all steps
        for name in reversed(marked_alike(study, RATINGS, mark)[-_STUDIES:]):
            if len(study.get_trials(deepcopy=False)) < plan.trials:
                self._read(optuna.load_study(study_name=name, storage=study._storage), plan)

    def before(self, evaluate: Evaluate) -> Evaluate:
        """A function that asks ``evaluate`` for what is not known, and for nothing else."""
        if not self._known:
            return evaluate

        def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
            outcomes = [self._known.get(_key(candidate)) for candidate in candidates]
            missing = [
                c for c, outcome in zip(candidates, outcomes, strict=True) if outcome is None
            ]
            rated = iter(evaluate(missing) if missing else [])
            self.taken += len(candidates) - len(missing)
            return [next(rated) if outcome is None else outcome for outcome in outcomes]

        return rate

    def _read(self, other: optuna.Study, plan: SearchPlan) -> None:
        for trial in other.get_trials(deepcopy=False):
            if trial.value is None or not {"method", "coefficients"} <= trial.user_attrs.keys():
                continue
            candidate = Candidate.from_dict(trial.user_attrs, plan.pattern)
            own_names = {*candidate.to_dict(), *NOTES}
            attributes = {n: value for n, value in trial.user_attrs.items() if n not in own_names}
            self._known.setdefault(
                _key(candidate), Outcome(value=trial.value, attributes=attributes)
            )


def _mark(request: SearchRequest, plan: SearchPlan, bundles: Sequence[str]) -> str:
    """A hash of all that a rating depends on, the candidate aside."""
    parts = [
        [*bundles], str(plan.pattern), plan.pattern.scope, request.objective.label,
        plan.steps.rated.linears.to_dict(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(candidate: Candidate) -> str:
    return json.dumps(replace(candidate, steps=candidate.steps.rated).to_dict(), sort_keys=True)
