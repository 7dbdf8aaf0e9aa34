"""
Between the search and the confirmation: correct the best allocation where the proxy is wrong.

The proxy adds linears up as if they did not depend on each other. The model knows better: how far
it is from the dense one says so for each allocation that is tried.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.pipeline.rating import windows_key
from pho_service.progress import Advance, Fence, Run
from pho_service.pruning.allocation_proxy import AllocationProxy
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.divergence import DenseReference, dense_reference, rate_divergence
from pho_service.pruning.offsets import bounds
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import Statistics
from pho_service.spec.allocation import MOST_DEPTHS, MOST_SHIFT, Allocation
from pho_service.spec.candidate import Candidate
from pho_service.spec.objective import Objective
from pho_service.spec.samplers import corrected_windows
from pho_service.spec.steps import Steps
from pho_service.tuning.correction import Array, Correction, Measured, next_point
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import CORRECTS, Evaluate, Outcome, RatedCandidate
from pho_service.tuning.search import finished_trial
from storage.studies import once

DIVERGENCE: Final = "calibration_divergence"  # user attribute of a trial
_TEXT = "calibration_sha256"  # user attribute of a correction: of the windows


def correct_best(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    objective: Objective,
    model: LanguageModel,
    bundle: ProxyBundle,
    calibration: Tensor,
    *,
    run: Run,
) -> Correction:
    """
    Try other allocations of the best candidate, and compare each with the dense model.

    Candidates are compared as the score prunes them, without the steps after it. Each is a trial
    of the study, recorded at once, so that another attempt goes on with the next; what is
    proposed depends on the seed and on the trials before alone.

    Args:
        islands: The record; corrections are added to the study of the best.
        rated: Every finished trial, best first by the objective.
        objective: What they were rated by.
        model: Dense, not streamed; it is given back dense.
        bundle: Bundle of the model.
        calibration: (windows, context_length), int64: the last, which are not those that were run
            backward, are compared on.
        run: What it is done with.

    Raises:
        InvalidInput: All linears have a sparsity by hand, or the best candidate's spread is 0.
        NumericalError: The best candidate gives NaN or infinity. One that is tried and does is a
            failed trial.
    """
    start = rated[0]
    _check_shared_out(start.candidate, bundle)
    evaluator = ProxyEvaluator(bundle, run.device)
    numbers = _Numbers(AllocationProxy(evaluator, start.candidate, objective.weighting))
    record = _Record(islands, start, rate_by_proxy(evaluator, objective), run.fence)
    count = islands.plan.corrections
    with run.progress("Correcting the allocation", count) as advance:
        divergence = _Divergence(model, bundle.statistics(), calibration, lambda _: advance(0))
        run.look()
        study, there = islands.place(start.number)
        stored = once(
            study,
            f"{DIVERGENCE}:{there}",
            {"text_sha256": divergence.key},
            lambda: {DIVERGENCE: divergence(start.candidate)},
            fence=run.fence,
            note=(there, DIVERGENCE),
        )
        before = float(stored[DIVERGENCE])
        measured = [numbers.measured(start.candidate.steps.allocation, before)]
        trials = record.known(divergence.key)[:count]
        for number in range(count):
            if number == len(trials):
                run.look()
                seed = [islands.plan.seed, number]
                point = next_point(measured, numbers.rate, seed=seed)
                trials.append(record.add(numbers.at(start.candidate, point), divergence))
            trial = trials[number]
            if trial.state is TrialState.COMPLETE:
                allocation = Steps.from_dict(trial.user_attrs["steps"]).allocation
                measured.append(numbers.measured(allocation, trial.user_attrs[DIVERGENCE]))
            advance(1)
    return record.outcome(trials, before, divergence.tokens)


def _check_shared_out(candidate: Candidate, bundle: ProxyBundle) -> None:
    """Raise InvalidInput if no linear may lose more or less than another."""
    low, high = bounds(candidate.pattern, candidate.steps.allocation.spread)
    if low == high or not bundle.choose(candidate.steps.linears, candidate.pattern).shared:
        raise InvalidInput(
            f"corrections have nothing to correct: the best candidate lets each linear lose "
            f"{low:g} to {high:g}, and those with a sparsity by hand exactly that. Give "
            "corrections=0, or leave a linear without a sparsity of its own."
        )


class _Numbers:
    """The numbers of an allocation that are corrected: an offset for each kind, and depths."""

    def __init__(self, proxy: AllocationProxy) -> None:
        self._proxy = proxy

    def _kinds(self, allocation: Allocation) -> list[str]:
        return [] if allocation.unit == "block" else self._proxy.kinds

    def measured(self, allocation: Allocation, divergence: float) -> Measured:
        """Measurements of an allocation."""
        offsets = [allocation.offsets.get(kind, 0.0) for kind in self._kinds(allocation)]
        rest = [0.0] * (MOST_DEPTHS - len(allocation.depth))
        point = np.array([*offsets, *allocation.depth, *rest])
        return Measured(point=point, proxy=float(self.rate(point[None])[0]), value=divergence)

    def allocation(self, like: Allocation, point: Array) -> Allocation:
        """An allocation with these numbers."""
        kinds = self._kinds(like)
        values = np.clip(point, -MOST_SHIFT, MOST_SHIFT).tolist()
        offsets = dict(zip(kinds, values[: len(kinds)], strict=True))
        return replace(like, offsets=offsets, depth=tuple(values[len(kinds) :]))

    def at(self, candidate: Candidate, point: Array) -> Candidate:
        """A candidate with these numbers, which the search has found in any case."""
        allocation = self.allocation(candidate.steps.allocation, point)
        steps = replace(candidate.steps, allocation=allocation)
        return replace(candidate, method="crepe", steps=steps)

    def rate(self, points: Array) -> Array:
        """(points,): the proxy of each."""
        like = self._proxy.allocation
        return np.array(self._proxy.rate([self.allocation(like, point) for point in points]))


class _Divergence:
    """
    Compares candidates with the dense model on calibration windows, as their scores prune them.

    Args:
        model: Dense, not streamed; it is given back dense each time.
        statistics: Its statistics.
        windows: (windows, context_length), int64: the last are compared on.
        advance: Called after each window, and when the model is pruned.
    """

    def __init__(
        self, model: LanguageModel, statistics: Statistics, windows: Tensor, advance: Advance
    ) -> None:
        self._model, self._statistics, self._advance = model, statistics, advance
        self._windows = windows[-corrected_windows(windows.shape[1]) :]

    @property
    def key(self) -> str:
        """Hash of the windows."""
        return windows_key(self._windows)

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    @cached_property
    def _reference(self) -> DenseReference:
        return dense_reference(self._model.model, self._windows)

    def __call__(self, candidate: Candidate) -> float:
        """Give the divergence in nats."""
        reference = self._reference
        masked = replace(candidate, steps=candidate.steps.rated)
        with pruned_model(self._model, self._statistics, masked, None, advance=self._advance):
            return rate_divergence(self._model.model, reference, advance=self._advance)


class _Record:
    """The corrections of a candidate as trials of its study."""

    def __init__(
        self,
        islands: Islands,
        start: RatedCandidate,
        rate: Evaluate,
        fence: Fence,
    ) -> None:
        self._islands, self._start, self._rate, self._fence = islands, start, rate, fence
        self._study, self._number = islands.place(start.number)
        self._plan = islands.plans[islands.of_island(start.number)]

    def known(self, key: str) -> list[FrozenTrial]:
        """Those that are there already, measured on the same windows."""
        wanted = {CORRECTS: self._number, _TEXT: key}
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if wanted.items() <= trial.user_attrs.items()
        ]

    def add(self, candidate: Candidate, divergence: _Divergence) -> FrozenTrial:
        """Rate and measure a candidate, and record it."""
        began, started = datetime.now(), time.perf_counter()  # as Optuna's times are
        (outcome,) = self._rate([candidate])
        attributes: dict[str, Any] = {CORRECTS: self._number, _TEXT: divergence.key}
        if outcome.value is not None:
            try:
                attributes[DIVERGENCE] = divergence(candidate)
            except NumericalError as error:
                outcome = Outcome(value=None, failure=str(error))
        attributes["seconds"] = round(time.perf_counter() - started, 4)
        outcome = replace(outcome, attributes={**outcome.attributes, **attributes})
        trial = finished_trial(self._plan, candidate, outcome, (began, datetime.now()))
        with self._fence():
            self._study.add_trial(trial)
        return self._study.get_trials(deepcopy=False)[-1]

    def outcome(self, trials: Sequence[FrozenTrial], before: float, tokens: int) -> Correction:
        """What came of all of them; of equal ones the first counts."""
        values = {
            trial.number: float(trial.user_attrs[DIVERGENCE])
            for trial in trials
            if trial.state is TrialState.COMPLETE
        }
        nearest = min(values, key=values.__getitem__, default=None)
        if nearest is None or values[nearest] >= before:
            number, after = None, before
        else:
            island = self._islands.of_island(self._start.number)
            number = nearest * len(self._islands.studies) + island
            after = values[nearest]
        return Correction(
            corrects=self._start.number,
            trial=number,
            divergences=(before, after),
            count=len(trials),
            tokens=tokens,
        )
