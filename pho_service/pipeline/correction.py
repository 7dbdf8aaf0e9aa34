"""
Corrections: move sparsity between the linears of the best candidate, by the slope of its loss.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError, field_name
from pho_service.models.architecture import decoder_blocks
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.objectives import rate_by_proxy
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.rating import windows_key
from pho_service.progress import Advance, Fence, Run
from pho_service.pruning.allocation import MAX_SPARSITY, bounds
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import layer_score, linear_losses
from pho_service.pruning.perplexity import DenseReference, dense_reference, rate_divergence
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.sharing import Border, fairer, slopes
from pho_service.pruning.statistics import Statistics
from pho_service.spec.objective import Objective, corrected_windows, shared_windows
from pho_service.spec.pattern import Scope
from pho_service.spec.steps import MOST_SHIFT, Allocation, Candidate
from pho_service.tuning.correction import Correction
from pho_service.tuning.plan import CORRECTS, Evaluate, Outcome, RatedCandidate
from pho_service.tuning.search import Islands, finished_trial
from storage.studies import once

DIVERGENCE: Final = "calibration_divergence"  # user attribute of a trial
_TEXT = "calibration_sha256"  # user attribute of a correction: of the windows
_RATE = 0.3  # log-odds of what is kept, for a slope of one standard deviation, in the first step
_HALVED = 4  # steps after which it is half of that


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
    """Move sparsity between the linears of the best candidate, by the slope of its loss."""
    # Candidates are compared as the score prunes them, without the steps after it. Each is a trial
    # of the study, recorded at once, so that another attempt goes on with the next; what is
    # proposed depends on the trial before and on its number alone.
    start = rated[0]
    _check_shared_out(start.candidate, bundle)
    statistics = bundle.statistics()
    evaluate = rate_by_proxy(ProxyEvaluator(bundle, run.device), objective)
    record = _Record(islands, start, evaluate, run.fence)
    count = islands.plan.corrections
    if len(calibration) < 2:
        raise InvalidInput(
            "corrections measure on other windows than those that they learn from, and the "
            "calibration has only one. Give 2 "
            f"{field_name('calibration/samples')} or more, or corrections=0."
        )
    held_out = min(corrected_windows(calibration.shape[1]), len(calibration) // 2)
    training, held_out_windows = calibration[:-held_out], calibration[-held_out:]
    spread = islands.plan.space.allocation_spread[1]
    sharing = _Sharing(model, statistics, training, spread)
    with run.progress("Correcting the allocation", count) as advance:
        divergence = _Divergence(model, statistics, held_out_windows, lambda _: advance(0))
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
        trials, current = record.known(divergence.key)[:count], start.candidate
        for number in range(count):
            if number == len(trials):
                run.look()
                shared = sharing.fairer(current, number, lambda: advance(0))
                trials.append(record.add(shared, divergence))
            if trials[number].state is TrialState.COMPLETE:
                current = Candidate.from_dict(trials[number].user_attrs, islands.plan.pattern)
            advance(1)
    return record.outcome(trials, float(stored[DIVERGENCE]), divergence.tokens)


def _check_shared_out(candidate: Candidate, bundle: ProxyBundle) -> None:
    """Raise InvalidInput if no linear may lose more or less than another."""
    low, high = bounds(candidate.pattern, candidate.steps.allocation.spread)
    if low == high or not bundle.choose(candidate.steps.linears, candidate.pattern).shared:
        raise InvalidInput(
            f"corrections have nothing to correct: the best candidate lets each linear lose "
            f"{low:g} to {high:g}, and those with a sparsity by hand exactly that. Give "
            "corrections=0, or leave a linear without a sparsity of its own."
        )


class _Sharing:
    """Where an allocation should give linears more, and where less."""

    def __init__(
        self,
        model: LanguageModel,
        statistics: Statistics,
        windows: Tensor,
        spread: float,
    ) -> None:
        self._model, self._statistics, self._spread = model, statistics, spread
        self._windows = windows
        self._chosen: list[int] = []
        self._reference: DenseReference | None = None

    def _asked(self, number: int) -> DenseReference:
        """What the dense model predicts on the windows of a step; they take turns."""
        count = shared_windows(len(self._windows), self._windows.shape[1])
        chosen = [(number * count + i) % len(self._windows) for i in range(count)]
        if self._reference is None or chosen != self._chosen:
            self._chosen = chosen
            self._reference = dense_reference(self._model.model, self._windows[chosen])
        return self._reference

    def fairer(self, candidate: Candidate, number: int, look: Callable[[], None]) -> Candidate:
        """The candidate of a step, from the one before."""
        linears, pattern = self._model.linears, candidate.pattern
        masked = replace(candidate, steps=candidate.steps.rated)
        removed = linear_losses(linears, self._statistics, masked).shares
        sizes = {name: linears[name].weight.numel() for name in removed}
        lost = {name: removed[name] / size for name, size in sizes.items()}
        borders = {
            name: Border.of(
                linears[name],
                layer_score(linears, self._statistics, name, candidate.coefficients),
                share,
                by_row=pattern.scope is Scope.ROW,
            )
            for name, share in lost.items()
        }
        reference = self._asked(number)
        sums = dict.fromkeys(lost, 0.0)
        blocks = [block for _, block in decoder_blocks(self._model.model)]
        with pruned_model(self._model, self._statistics, masked, None, lambda _: look()):
            for found in slopes(self._model.model, blocks, borders, reference):
                for name, slope in found.items():
                    sums[name] += slope
                look()
        rate = _RATE / (1 + number / _HALVED)
        more = fairer(sums, sizes, rate=rate)
        own = {name: _log_odds(pattern.sparsity) - _log_odds(lost[name]) for name in lost}
        offsets = {name: round(own[name] + more[name], 4) for name in lost}
        allocation = Allocation(
            spread=self._spread,
            offsets={n: min(max(o, -MOST_SHIFT), MOST_SHIFT) for n, o in offsets.items()},
        )
        steps = replace(candidate.steps, allocation=allocation)
        return replace(candidate, method="crepe", steps=steps)


def _log_odds(share: float) -> float:
    share = min(max(share, 1 - MAX_SPARSITY), MAX_SPARSITY)
    return math.log(share / (1 - share))


class _Divergence:
    """Compares candidates, pruned by their scores, with the dense model on calibration windows."""

    def __init__(
        self, model: LanguageModel, statistics: Statistics, windows: Tensor, advance: Advance
    ) -> None:
        self._model, self._statistics, self._advance = model, statistics, advance
        self._windows = windows

    @property
    def key(self) -> str:
        return windows_key(self._windows)

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    @cached_property
    def _reference(self) -> DenseReference:
        return dense_reference(self._model.model, self._windows)

    def __call__(self, candidate: Candidate) -> float:
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
            allocation=self._start.candidate.steps.allocation.to_dict(),
            trial=number,
            divergences=(before, after),
            count=len(trials),
            tokens=tokens,
        )
