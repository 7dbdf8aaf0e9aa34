"""
Run a search, or go on with one: candidates in generations, each finished trial recorded once.
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.errors import StudyError, field_name
from pho_service.progress import Fence
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import (
    CHOSEN,
    SECOND_OPINION,
    Direction,
    Evaluate,
    Outcome,
    RatedCandidate,
    SearchPlan,
)
from pho_service.tuning.samplers import CmaSampler, is_exhausted, make_sampler
from storage.studies import kept, quiet_optuna

logger = logging.getLogger(__name__)

Callback = Callable[[optuna.Study, FrozenTrial], None]

RATINGS = "ratings_sha256"  # record of a study: what the values of its trials depend on
INHERITED = "inherited"  # record of a fork's study: whose trials it began with; of a trial: which
NOTES = ("divergence", "perplexity", CHOSEN, INHERITED)  # noted of a trial after it was rated

_ROUNDING = 1e-4  # of a coefficient: a Gaussian process's candidates have differed by 4e-6


def run_search(
    study: optuna.Study,
    plan: SearchPlan,
    evaluate: Evaluate,
    advance: Callable[[int], None] = lambda _: None,
    *,
    fence: Fence = nullcontext,
    callbacks: Sequence[Callback] = (),
) -> list[RatedCandidate]:
    """Bring a study to ``plan.trials`` trials and give them, best first."""
    # It has fewer if the sampler ends by itself, as the hill climb does, or if a callback calls
    # ``study.stop()``.
    recorded = searched(study, plan)
    unfinished = [t.number for t in recorded if not t.state.is_finished()]
    if unfinished:
        raise StudyError(
            f"trial {unfinished[0]} of study {study.study_name!r} is not finished, and PHO only "
            "records finished ones: another program writes to this study. Use another "
            f"{field_name('study') or 'study'}."
        )
    directions = [direction.name.lower() for direction in study.directions]
    if directions != [plan.direction]:
        raise StudyError(
            f"study {study.study_name!r} is to {' and '.join(directions)} its values, and this "
            f"search is to {plan.direction} one. Use another study, with "
            f"direction={plan.direction!r}."
        )
    before = inherited(study)
    known = [_as_point(trial, plan, study) for trial in recorded[:before]]
    recorder = _Recorder(study, plan, recorded[before:], fence, callbacks)
    recorder.finish(plan.baselines(), evaluate, advance)
    space = plan.space.distributions()
    values = recorder.finish(
        [plan.space.candidate(params, plan.pattern, plan.steps) for params in plan.warm_start],
        evaluate,
        advance,
    )
    warm = [(v, p) for v, p in zip(values, plan.warm_start, strict=True) if v is not None]
    better = min if plan.direction == "minimize" else max
    begins = [*warm, *((t.value, t.params) for t in known if t.value is not None)]
    start = better(begins, key=lambda pair: pair[0])[1] if begins else None
    sampler = plan.sampler
    if isinstance(sampler, str):
        sampler = make_sampler(
            sampler,
            plan,
            search_space=space,
            start=start,
            effective=plan.space.effective,
        )
    with quiet_optuna():
        memory = optuna.create_study(direction=plan.direction, sampler=sampler)
    memory.add_trials(known)
    for start_value, params in warm:
        memory.add_trial(create_trial(value=start_value, params=dict(params), distributions=space))
    if not isinstance(plan.sampler, str):  # nobody knows what it would have drawn
        memory.add_trials([_as_point(trial, plan, study) for trial in recorder.skip(advance)])
    first = recorder.done  # what a sampler draws before it is told anything is the same everywhere
    while (
        recorder.done < plan.trials and not recorder.stopped and not is_exhausted(sampler, memory)
    ):
        # Always a whole generation, so that a longer search begins as a shorter one did.
        generation = [memory.ask(space) for _ in range(plan.generation)]
        trials = generation[: plan.trials - recorder.done]
        outcomes = recorder.finish(
            [plan.space.candidate(trial.params, plan.pattern, plan.steps) for trial in trials],
            evaluate,
            advance,
            _adopting(sampler, trials) if recorder.done > first else None,
        )
        for trial, value in zip(trials, outcomes, strict=True):
            if value is None:
                memory.tell(trial, state=TrialState.FAIL)
            else:
                memory.tell(trial, value)
    return ranked(study, plan)


def _adopting(
    sampler: BaseSampler, trials: Sequence[optuna.Trial]
) -> Callable[[int, Mapping[str, Any]], None] | None:
    """Give a function that makes a sampler take other points for its own; None if it cannot."""
    if not isinstance(sampler, CmaSampler):
        return None
    return lambda i, params: sampler.adopt(trials[i].number, params)


def inherited(study: optuna.Study) -> int:
    """How many of a study's trials are another job's: those that a fork began with, its first."""
    return int(kept(study, INHERITED, {}).get("trials", 0))


def fork_in_words(fork: Mapping[str, Any]) -> str:
    """Say what the record of a fork's study tells."""
    return (
        f"Fork of job {fork['job']}: the search began with {fork['trials']} of its {fork['rated']} "
        "trials, those that lie inside the search space."
    )


def heirs(trials: Iterable[tuple[int, FrozenTrial]], plan: SearchPlan) -> list[FrozenTrial]:
    """The trials of another search that lie in the space of a plan, as the first of its study."""
    own = []
    for number, trial in trials:
        if trial.value is None or _point_of(trial, plan) is None:
            continue
        attributes = {n: v for n, v in trial.user_attrs.items() if n not in NOTES}
        heir = create_trial(
            value=trial.value,
            params=trial.params,
            distributions=plan.space.recorded_distributions(),
            user_attrs={**attributes, INHERITED: f"trial {number}"},
        )
        heir.datetime_start, heir.datetime_complete = trial.datetime_start, trial.datetime_complete
        own.append(heir)
    return own


def outside(trials: Sequence[FrozenTrial], plan: SearchPlan) -> str:
    """Which values of trials all lie beyond a bound, and where; of trials that are all outside."""
    own = [trial.params for trial in trials]
    near = [plan.space.nearest(Candidate.from_dict(t.user_attrs, plan.pattern)) for t in trials]
    beyond = []
    for name in near[0]:
        if not any(_alike(a[name], b[name]) for a, b in zip(own, near, strict=True)):
            values = sorted({params[name] for params in own})
            ends = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (values[0], values[-1])]
            beyond.append(f"their {name} is {' to '.join(dict.fromkeys(ends))}")
    return ", ".join(beyond) or "each has a value beyond some bound"


def _point_of(trial: FrozenTrial, plan: SearchPlan) -> dict[str, Any] | None:
    """Where a trial lies in the space of a plan; None if it does not, or has other steps."""
    attributes = {name: trial.user_attrs.get(name) for name in ("coefficients", "steps")}
    if not all(attributes.values()):
        return None
    point = plan.space.nearest(Candidate.from_dict(trial.user_attrs, plan.pattern))
    document = plan.space.candidate(point, plan.pattern, plan.steps).to_dict()
    return point if _alike(attributes, {name: document[name] for name in attributes}) else None


def _as_point(trial: FrozenTrial, plan: SearchPlan, study: optuna.Study) -> FrozenTrial:
    """Make a recorded trial one that a sampler can be told: a point of the searched space."""
    point = _point_of(trial, plan)
    if point is None:
        raise StudyError(
            f"trial {trial.number} of study {study.study_name!r} is not in the space that this "
            "search is to be in, or has other steps. Use another study."
        )
    return create_trial(
        state=trial.state, value=trial.value, params=point, distributions=plan.space.distributions()
    )


def _spans(
    began: datetime, ended: datetime, outcomes: Sequence[Outcome]
) -> list[tuple[datetime, datetime]]:
    """When each candidate of a generation was rated: one after the other."""
    # Each takes the share of the time that its outcome's ``seconds`` say; the same where one of
    # them does not say.
    seconds = [float(outcome.attributes.get("seconds", 0.0)) for outcome in outcomes]
    if not all(seconds):
        seconds = [1.0] * len(outcomes)
    whole = ended - began
    ends = [began + whole * (until / sum(seconds)) for until in accumulate(seconds)]
    return list(zip([began, *ends[:-1]], ends, strict=True))


class _Recorder:
    """Walks along the trials of a study, replaying those that are there, adding the rest."""

    def __init__(
        self,
        study: optuna.Study,
        plan: SearchPlan,
        recorded: Sequence[FrozenTrial],
        fence: Fence,
        callbacks: Sequence[Callback],
    ) -> None:
        self.fence = fence
        self.callbacks = callbacks
        self.stopped = False
        self.study = study
        self.plan = plan
        self.recorded = recorded
        self.done = 0

    def skip(self, advance: Callable[[int], None]) -> list[FrozenTrial]:
        """The recorded trials that are left, without a look at what they are."""
        trials = [*self.recorded[self.done :]]
        self.done += len(trials)
        advance(len(trials))
        return trials

    def finish(
        self,
        candidates: list[Candidate],
        evaluate: Evaluate,
        advance: Callable[[int], None],
        adopt: Callable[[int, Mapping[str, Any]], None] | None = None,
    ) -> list[float | None]:
        """The value of each candidate, from the record or from ``evaluate``."""
        # ``adopt`` is told of the recorded ones that are others: their places, and their points.
        recorded = self.recorded[self.done : self.done + len(candidates)]
        for i, (trial, candidate) in enumerate(zip(recorded, candidates, strict=False)):
            if self._is_of(trial, candidate):
                continue
            if adopt is None or trial.user_attrs.get("method") != candidate.method:
                raise self._other(trial)
            logger.info(
                "trial %d of study %r is another machine's", trial.number, self.study.study_name
            )
            adopt(i, trial.params)
        values = [trial.value if trial.state is TrialState.COMPLETE else None for trial in recorded]
        fresh = candidates[len(recorded) :]
        if fresh:
            began = datetime.now()  # as Optuna's times are
            outcomes = evaluate(fresh)
            spans = _spans(began, datetime.now(), outcomes)
            trials = [  # fewer than candidates where one of them raised
                _finished_trial(self.plan, *each)
                for each in zip(fresh, outcomes, spans, strict=False)
            ]
            with self.fence():
                self.study.add_trials(trials)
            self._call(len(trials))
            if raised := outcomes[-1].raised:
                raise raised
            values += [outcome.value for outcome in outcomes]
        self.done += len(candidates)
        advance(len(candidates))
        return values

    def _call(self, count: int) -> None:
        """Call the callbacks with the last ``count`` trials; one of them may stop the search."""
        if not self.callbacks:
            return
        trials = self.study.get_trials()[-count:]
        loop = self.study._thread_local  # where Optuna keeps whether Study.stop may be called
        self.study._stop_flag = False
        loop.in_optimize_loop = True
        try:
            for trial in trials:
                for callback in self.callbacks:
                    callback(self.study, trial)
        finally:
            loop.in_optimize_loop = False
        self.stopped = self.stopped or self.study._stop_flag

    def _is_of(self, trial: FrozenTrial, candidate: Candidate) -> bool:
        """Return whether a recorded trial is a candidate's, but for rounding."""
        record, document = trial.user_attrs, candidate.to_dict()
        return all(_alike(record.get(part), document[part]) for part in ("coefficients", "steps"))

    def _other(self, trial: FrozenTrial) -> StudyError:
        return StudyError(
            f"trial {trial.number} of study {self.study.study_name!r} has other coefficients "
            "or steps than this search asks for there: it was made by another version of PHO "
            "or of a sampler, or by two searches at once. Use another "
            f"{field_name('study') or 'study'}."
        )


def _finished_trial(
    plan: SearchPlan, candidate: Candidate, outcome: Outcome, span: tuple[datetime, datetime]
) -> FrozenTrial:
    """The trial of a candidate that was rated, with when that began and ended."""
    attributes = {**candidate.to_dict(), **outcome.attributes}
    if outcome.failure:
        attributes["failure"] = outcome.failure
    trial = create_trial(
        state=TrialState.FAIL if outcome.value is None else TrialState.COMPLETE,
        value=outcome.value,
        params=plan.space.params(candidate),
        distributions=plan.space.recorded_distributions(),
        user_attrs=attributes,
    )
    trial.datetime_start, trial.datetime_complete = span
    return trial


def _alike(first: Any, second: Any) -> bool:
    """Return whether two JSON documents are the same, but for rounding that has grown."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_alike(first[k], second[k]) for k in second)
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    return bool(first == second)


def searched(study: optuna.Study, plan: SearchPlan) -> list[FrozenTrial]:
    """
    The trials of a search, by number, with those that a fork began with: its study has more if a
    longer search went on with it.
    """
    return study.get_trials(deepcopy=False)[: inherited(study) + plan.trials]


def ranked(study: optuna.Study, plan: SearchPlan) -> list[RatedCandidate]:
    """The finished trials of a search, best first; equal values by number."""
    trials = searched(study, plan)
    rated = [
        RatedCandidate(
            number=t.number,
            candidate=Candidate.from_dict(t.user_attrs, plan.pattern),
            params=t.params,
            value=t.value,
            second_opinion=t.user_attrs.get(SECOND_OPINION),
        )
        for t in trials
        if t.state is TrialState.COMPLETE and t.value is not None
    ]
    if not rated:
        cause = trials[0].user_attrs.get("failure", "unknown") if trials else "no trials"
        raise StudyError(f"every trial of study {study.study_name!r} failed. The first: {cause}")
    sign = 1 if plan.direction == "minimize" else -1
    return sorted(rated, key=lambda r: (sign * r.value, r.number))


@dataclass(frozen=True)
class Islands:
    """The studies of one search, one an island; trials have numbers of their own among all."""

    # Trial 3 of the second of four islands is number 3 * 4 + 1. With one study the numbers are its.

    studies: Sequence[optuna.Study]  # Studies of each island
    plans: Sequence[SearchPlan]  # Plans of each island; they differ in their seeds

    @property
    def plan(self) -> SearchPlan:
        """The plan of the first, whose seed is the one that was asked for."""
        return self.plans[0]

    def ranked(self) -> list[RatedCandidate]:
        """The finished trials of all islands, best first; equal values by number."""
        # Baselines, and what a fork began with, are the same in each island: only the first counts.
        first = inherited(self.studies[0])
        rated = [
            replace(trial, number=trial.number * len(self.studies) + island)
            for island, (study, plan) in enumerate(zip(self.studies, self.plans, strict=True))
            for trial in ranked(study, plan)
            if island == 0 or (trial.number >= first and trial.candidate.method == "crepe")
        ]
        sign = 1 if self.plan.direction == "minimize" else -1
        return sorted(rated, key=lambda r: (sign * r.value, r.number))

    def place(self, number: int) -> tuple[optuna.Study, int]:
        """The study that a trial is in, and its number there."""
        trial, island = divmod(number, len(self.studies))
        return self.studies[island], trial

    def of_island(self, number: int) -> int:
        """The island that a trial is in, from 0."""
        return number % len(self.studies)

    def attributes(self, number: int) -> Mapping[str, Any]:
        study, trial_number = self.place(number)
        (trial,) = (t for t in study.get_trials(deepcopy=False) if t.number == trial_number)
        attributes: Mapping[str, Any] = trial.user_attrs
        return attributes

    @property
    def finished(self) -> int:
        """Number of trials that were rated here, the baselines in each island."""
        return sum(
            len(searched(study, plan)) - inherited(study)
            for study, plan in zip(self.studies, self.plans, strict=True)
        )

    @property
    def asked(self) -> int:
        """Number of trials that the plans ask for."""
        return sum(plan.trials for plan in self.plans)


_OF = "of_study"  # user attribute of a trial: where it was searched
_KEPT = ("method", "coefficients", "steps", "perplexity", "divergence")
_AT_ONCE = 100  # trials that are written within one fence: about half a second


def pareto_name(model: str, studies: Sequence[str]) -> str:
    """The name of the study of a curve: the same studies give the same one."""
    digest = hashlib.sha256(json.dumps(sorted(studies)).encode()).hexdigest()[:10]
    return f"{model} curve of sparsities {digest}"


def pareto_study(
    name: str, direction: Direction, objective: str, storage: BaseStorage | None
) -> optuna.Study:
    """Make or open a study of (sparsity, objective), whose Pareto front optuna-dashboard draws."""
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
    """Add the trials of a search to the study of its curve; those that are there are left out."""
    keys = {
        (trial.user_attrs.get(_OF), trial.user_attrs.get("trial"))
        for trial in pareto.get_trials(deepcopy=False)
    }
    points = [
        _point(trial, study.study_name, (sparsity, trial.value), pattern)
        for trial in study.get_trials(deepcopy=False)
        if trial.value is not None and (study.study_name, trial.number) not in keys
    ]
    for first in range(0, len(points), _AT_ONCE):
        with fence():
            pareto.add_trials(points[first : first + _AT_ONCE])


def _point(
    trial: FrozenTrial, study: str, values: tuple[float, float], pattern: str
) -> FrozenTrial:
    attributes = {name: trial.user_attrs[name] for name in _KEPT if name in trial.user_attrs}
    point = create_trial(
        state=TrialState.COMPLETE,
        values=values,
        user_attrs={"pattern": pattern, _OF: study, "trial": trial.number, **attributes},
    )
    point.datetime_start, point.datetime_complete = trial.datetime_start, trial.datetime_complete
    return point
