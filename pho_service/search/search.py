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
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.errors import StudyError
from pho_service.search.plan import Evaluate, Outcome, RatedCandidate, SearchPlan
from pho_service.search.samplers import CmaSampler, is_exhausted, make_sampler
from pho_service.spec.candidate import Candidate
from pho_service.spec.samplers import SAMPLERS
from pho_service.spec.steps import Steps

logger = logging.getLogger(__name__)


_ROUNDING = 1e-4  # of a coefficient: a Gaussian process's candidates have differed by 4e-6


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
        known = {"steps": Steps().to_dict(), **trial.user_attrs}  # older versions wrote no steps
        asked = candidate.to_dict()
        return all(_alike(known.get(part), asked[part]) for part in ("coefficients", "steps"))

    def _other(self, trial: FrozenTrial) -> StudyError:
        return StudyError(
            f"trial {trial.number} of study {self.study.study_name!r} has other coefficients "
            "or steps than this search asks for there: it was made by another version of PHO "
            "or of a sampler, or by two searches at once. Use another --study."
        )

    def _trial(self, candidate: Candidate, outcome: Outcome) -> FrozenTrial:
        attributes = {**candidate.to_dict(), **outcome.attributes}
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
            candidate=Candidate.from_dict(t.user_attrs, plan.pattern),
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
