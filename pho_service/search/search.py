"""
Run a search, or go on with one: candidates in generations, each finished trial recorded once.

Nothing but the finished trials is stored. A search that was interrupted asks
its sampler again for the candidates that are recorded already, checks that
they are the same, tells their values, and goes on with the next: the result
is that of an uninterrupted run. Where another machine recorded them, whose
arithmetic rounds otherwise, they may differ a little, and those of the CMA-ES
in the end altogether: an eigenvector has two directions. The record counts.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.errors import InvalidInput, StudyError
from pho_service.search.samplers import CmaSampler, is_exhausted, make_sampler
from pho_service.search.space import SearchSpace
from pho_service.spec import (
    SAMPLERS,
    Candidate,
    Coefficients,
    Pattern,
    Scope,
    Steps,
    check_seed,
    search_baselines,
)

logger = logging.getLogger(__name__)

Direction = Literal["minimize", "maximize"]

_ROUNDING = 1e-4  # of a coefficient: a Gaussian process's candidates have differed by 4e-6
CONFIRMED = 3  # finalists that get a perplexity, and the best baseline


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    What rating one candidate gave.

    Attributes:
        value: The objective, finite; None if the rating failed.
        attributes: JSON values to record with the trial.
        failure: Why it failed.
    """

    value: float | None
    attributes: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


Evaluate = Callable[[Sequence[Candidate]], list[Outcome]]


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """
    A search, complete but for the function that rates.

    Attributes:
        pattern: What is pruned.
        space: The box; fitted to the pattern.
        steps: What every candidate goes through; method and spread of its allocation are those
            of the space.
        sampler: A name of :data:`pho_service.spec.SAMPLERS`.
        trials: How many, baselines included; the hill climb may end before.
        seed: Of the sampler.
        direction: Whether low or high values are good.
        fisher: Whether the plain second-order score is among the baselines.
        warm_start: Points of the space that were found elsewhere: the trials after the baselines.
            The sampler begins around the best of them.
    """

    pattern: Pattern
    space: SearchSpace
    steps: Steps = field(default_factory=Steps)
    sampler: str = "cmaes"
    trials: int = 200
    seed: int = 0
    direction: Direction = "minimize"
    fisher: bool = True
    warm_start: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.steps.check_pattern(self.pattern)
        for method in self.space.allocations:
            allocation = replace(self.steps.allocation, method=method)
            replace(self.steps, allocation=allocation).check_pattern(self.pattern)
        if self.sampler not in SAMPLERS:
            raise InvalidInput(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}.")
        first = len(self.baselines()) + len(self.warm_start)
        if self.trials < first:
            warm = " and what the search starts from" if self.warm_start else ""
            raise InvalidInput(
                f"trials={self.trials} is too few: the first {first} are the baselines{warm}. Give "
                "more, 200 say."
            )
        check_seed(self.seed)

    def baselines(self) -> list[Candidate]:
        """The first trials."""
        return search_baselines(
            self.pattern,
            kernel_size=self.space.kernel_sizes[0],
            fisher=self.fisher,
            steps=self.steps,
            allocations=self.space.allocations,
        )


@dataclass(frozen=True, kw_only=True)
class RatedCandidate:
    """A finished trial."""

    number: int
    candidate: Candidate
    params: dict[str, Any]
    value: float


def run_search(
    study: optuna.Study,
    plan: SearchPlan,
    evaluate: Evaluate,
    advance: Callable[[int], None] = lambda _: None,
    *,
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[RatedCandidate]:
    """
    Bring a study to ``plan.trials`` trials and give them, best first.

    It has fewer if the sampler ends by itself, as the hill climb does.

    Args:
        study: The record; may hold some of the trials already.
        plan: What to search.
        evaluate: Rates candidates; called with a generation at a time.
        advance: Called with the number of trials that became finished.
        fence: Entered around every write of a generation; may refuse by raising.

    Raises:
        StudyError: The study holds other trials than this plan gives, or
            nothing but failed ones.
    """
    recorded = [t for t in study.get_trials(deepcopy=False) if t.number < plan.trials]
    unfinished = [t.number for t in recorded if not t.state.is_finished()]
    if unfinished:
        raise StudyError(
            f"trial {unfinished[0]} of study {study.study_name!r} is not finished, and PHO only "
            "records finished ones: another program writes to this study. Use another --study."
        )
    recorder = _Recorder(study, plan, recorded, fence)
    recorder.finish(plan.baselines(), evaluate, advance)
    space = plan.space.distributions()
    found = recorder.finish(
        [plan.space.candidate(params, plan.pattern, plan.steps) for params in plan.warm_start],
        evaluate,
        advance,
    )
    warm = [(v, p) for v, p in zip(found, plan.warm_start, strict=True) if v is not None]
    better = min if plan.direction == "minimize" else max
    start = better(warm, key=lambda pair: pair[0])[1] if warm else None
    sampler = make_sampler(
        plan.sampler,
        seed=plan.seed,
        search_space=space,
        start=start,
        effective=plan.space.effective,
    )
    memory = optuna.create_study(direction=plan.direction, sampler=sampler)
    for known, params in warm:
        memory.add_trial(create_trial(value=known, params=dict(params), distributions=space))
    first = recorder.done  # what a sampler draws before it is told anything is the same everywhere
    while recorder.done < plan.trials and not is_exhausted(sampler, memory):
        # Always a whole generation, so that a longer search begins as a shorter one did.
        asked = [memory.ask(space) for _ in range(SAMPLERS[plan.sampler])]
        wanted = asked[: plan.trials - recorder.done]
        outcomes = recorder.finish(
            [plan.space.candidate(trial.params, plan.pattern, plan.steps) for trial in wanted],
            evaluate,
            advance,
            _adopting(sampler, wanted) if recorder.done > first else None,
        )
        for trial, value in zip(wanted, outcomes, strict=True):
            if value is None:
                memory.tell(trial, state=TrialState.FAIL)
            else:
                memory.tell(trial, value)
    return ranked(study, plan)


def _adopting(
    sampler: BaseSampler, asked: Sequence[optuna.Trial]
) -> Callable[[int, Mapping[str, Any]], None] | None:
    """What makes a sampler take other points for those it was asked for; None if it cannot."""
    if not isinstance(sampler, CmaSampler):
        return None
    return lambda i, params: sampler.adopt(asked[i].number, params)


class _Recorder:
    """Walks along the trials of a study, replaying those that are there, adding the rest."""

    def __init__(
        self,
        study: optuna.Study,
        plan: SearchPlan,
        recorded: Sequence[FrozenTrial],
        fence: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.fence = fence
        self.study = study
        self.plan = plan
        self.recorded = recorded
        self.done = 0

    def finish(
        self,
        candidates: list[Candidate],
        evaluate: Evaluate,
        advance: Callable[[int], None],
        adopt: Callable[[int, Mapping[str, Any]], None] | None = None,
    ) -> list[float | None]:
        """
        The value of each candidate, from the record or from ``evaluate``.

        ``adopt`` is told of the recorded ones that are others: their places, and their points.
        """
        known = self.recorded[self.done : self.done + len(candidates)]
        for i, (trial, candidate) in enumerate(zip(known, candidates, strict=False)):
            if self._is_of(trial, candidate):
                continue
            if adopt is None or trial.user_attrs.get("method") != candidate.method:
                raise self._other(trial)
            logger.info(
                "trial %d of study %r is another machine's", trial.number, self.study.study_name
            )
            adopt(i, trial.params)
        values = [trial.value if trial.state is TrialState.COMPLETE else None for trial in known]
        fresh = candidates[len(known) :]
        if fresh:
            outcomes = evaluate(fresh)
            trials = [self._trial(c, o) for c, o in zip(fresh, outcomes, strict=True)]
            with self.fence():
                self.study.add_trials(trials)
            values += [outcome.value for outcome in outcomes]
        self.done += len(candidates)
        advance(len(candidates))
        return values

    def _is_of(self, trial: FrozenTrial, candidate: Candidate) -> bool:
        """Whether a recorded trial is a candidate's, but for rounding."""
        known = trial.user_attrs
        return _alike(known.get("coefficients"), candidate.coefficients.to_dict()) and _alike(
            known.get("steps", Steps().to_dict()), candidate.steps.to_dict()
        )

    def _other(self, trial: FrozenTrial) -> StudyError:
        return StudyError(
            f"trial {trial.number} of study {self.study.study_name!r} has other coefficients "
            "or steps than this search asks for there: it was made by another version of PHO "
            "or of a sampler, or by two searches at once. Use another --study."
        )

    def _trial(self, candidate: Candidate, outcome: Outcome) -> FrozenTrial:
        attributes = {
            "method": candidate.method,
            "scope": candidate.pattern.scope.value,
            "coefficients": candidate.coefficients.to_dict(),
            "steps": candidate.steps.to_dict(),
            **outcome.attributes,
        }
        if outcome.failure:
            attributes["failure"] = outcome.failure
        return create_trial(
            state=TrialState.FAIL if outcome.value is None else TrialState.COMPLETE,
            value=outcome.value,
            params=self.plan.space.params(candidate),
            distributions=self.plan.space.recorded_distributions(),
            user_attrs=attributes,
        )


def _alike(known: Any, asked: Any) -> bool:
    """Whether two JSON documents are the same, but for rounding that has grown."""
    if isinstance(known, Mapping) and isinstance(asked, Mapping):
        return known.keys() == asked.keys() and all(_alike(known[k], asked[k]) for k in asked)
    if isinstance(known, float) and isinstance(asked, float):
        return math.isclose(known, asked, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    return bool(known == asked)


def ranked(study: optuna.Study, plan: SearchPlan) -> list[RatedCandidate]:
    """
    The finished trials of a search, best first; equal values by number.

    Raises:
        StudyError: All failed.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.number < plan.trials]
    rated = [
        RatedCandidate(
            number=t.number,
            candidate=Candidate(
                method=t.user_attrs["method"],
                coefficients=Coefficients(**t.user_attrs["coefficients"]),
                pattern=plan.pattern.within(Scope(t.user_attrs["scope"])),
                steps=Steps.from_dict(t.user_attrs.get("steps", {})),
            ),
            params=t.params,
            value=t.value,
        )
        for t in trials
        if t.state is TrialState.COMPLETE and t.value is not None
    ]
    if not rated:
        cause = trials[0].user_attrs.get("failure", "unknown") if trials else "no trials"
        raise StudyError(f"every trial of study {study.study_name!r} failed. The first: {cause}")
    sign = 1 if plan.direction == "minimize" else -1
    return sorted(rated, key=lambda r: (sign * r.value, r.number))


def finalists(rated: Sequence[RatedCandidate], count: int) -> list[RatedCandidate]:
    """
    The candidates that are looked at again: the best ``count`` different ones, and all baselines.

    Late generations of a search are nearly copies of its best; measuring
    copies would be a waste. A candidate is different if one of
    its values differs by 0.05 or more, or its kernel size or allocation does.
    Where each measurement takes a calibration of its own (re-pruning, weight
    updates), baselines get one only if they are among the best.

    Args:
        rated: Best first.
        count: How many, beside the baselines where those are measured anyway.

    Returns:
        Best first.
    """
    costly = any(c.candidate.steps.needs_text for c in rated)
    chosen: list[RatedCandidate] = []
    for candidate in rated:
        if (
            (costly or candidate.candidate.method == "crepe")
            and len(chosen) < count
            and all(_differ(candidate.params, other.params) for other in chosen)
        ):
            chosen.append(candidate)
    numbers = {c.number for c in chosen}
    return [
        c for c in rated if c.number in numbers or not (costly or c.candidate.method == "crepe")
    ]


def _differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if any(a[k] != b[k] for k in ("kernel_size", "allocation", "method")):
        return True
    return any(abs(a[k] - b[k]) >= 0.05 for k in a if isinstance(a[k], float))


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """
    How far candidates are from the dense model.

    Attributes:
        by_number: Mean Kullback-Leibler divergence in nats, by number of the trial.
        tokens: Predictions that it is the mean of; None if nothing was compared.
    """

    by_number: Mapping[int, float] = field(default_factory=dict)
    tokens: int | None = None


def best_by_divergence(
    compared: Sequence[RatedCandidate], divergences: Mapping[int, float], count: int = CONFIRMED
) -> list[RatedCandidate]:
    """
    The finalists that deserve a perplexity: the best ``count``, and the best baseline.

    Args:
        compared: Finalists, in any order.
        divergences: From the dense model, by the number of the trial.
        count: How many, the baseline not counted if it is none of them.

    Returns:
        In the order of ``compared``.
    """
    by_divergence = sorted(compared, key=lambda c: divergences[c.number])
    chosen = by_divergence[:count]
    chosen += [c for c in by_divergence if c.candidate.method != "crepe"][:1]
    numbers = {c.number for c in chosen}
    return [c for c in compared if c.number in numbers]


def confirmed_before(
    study: optuna.Study, rated: Sequence[RatedCandidate], *, text_sha256: str
) -> list[RatedCandidate]:
    """
    The candidates whose perplexity on a text a study holds already.

    They stay finalists, so that a longer search never ends with a worse result than the shorter
    one that it extends.

    Args:
        study: The record: see :func:`measure_once`.
        rated: Trials of it.
        text_sha256: Of the text and the way it is cut.

    Returns:
        In the order of ``rated``.
    """
    kept = study.user_attrs
    return [
        candidate
        for candidate in rated
        if kept.get(f"perplexity:{candidate.number}", {}).get("text_sha256") == text_sha256
    ]


def united(
    rated: Sequence[RatedCandidate], *groups: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """The candidates of several groups, each once, in the order of ``rated``."""
    numbers = {candidate.number for group in groups for candidate in group}
    return [candidate for candidate in rated if candidate.number in numbers]


def measure_once(
    study: optuna.Study,
    what: Literal["divergence", "perplexity"],
    number: int,
    candidate: Candidate,
    measure: Callable[[Candidate], float],
    *,
    text_sha256: str,
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """
    What a study holds of a finalist, measured and kept at once if it is not there.

    Args:
        study: The record. Its user attribute ``{what}:{number}`` holds the
            value and the text's hash; one of another text is measured again.
        what: Is measured.
        number: Of the trial in this study.
        candidate: Of it.
        measure: Prunes with a candidate and measures.
        text_sha256: Of the text and the way it is cut.
        fence: Entered around the write; may refuse by raising.
    """
    key = f"{what}:{number}"
    stored = study.user_attrs.get(key)
    if stored is None or stored.get("text_sha256") != text_sha256:
        stored = {
            "method": candidate.method,
            what: measure(candidate),
            "text_sha256": text_sha256,
        }
        with fence():
            study.set_user_attr(key, stored)
    return float(stored[what])


def confirm(
    study: optuna.Study,
    rated: Sequence[RatedCandidate],
    perplexity: Callable[[Candidate], float],
    *,
    text_sha256: str,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, RatedCandidate]]:
    """
    Measure the perplexity of finalists; each is kept in the study at once.

    Args:
        study: The record: see :func:`measure_once`.
        rated: The finalists.
        perplexity: Prunes with a candidate and measures.
        text_sha256: Of the text and the way it is cut.
        advance: Called with 1 after each finalist.

    Returns:
        (perplexity, candidate), best first; equal ones in the order of ``rated``.
    """
    measured = []
    for rating in rated:
        value = measure_once(
            study, "perplexity", rating.number, rating.candidate, perplexity,
            text_sha256=text_sha256,
        )  # fmt: skip
        measured.append((value, rating))
        advance(1)
    return sorted(measured, key=lambda pair: pair[0])
