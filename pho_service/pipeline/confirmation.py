"""
From the best by the proxy to the result: corrections, the race, the validation.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.objectives import proxy_value, rate_by_proxy
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.rating import (
    Glances,
    ReportText,
    Subject,
    compared_count,
    rate_pruned,
    windows_key,
)
from pho_service.pipeline.writing import written_by
from pho_service.progress import Advance, Fence, Run
from pho_service.pruning.allocation import bounds
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.perplexity import (
    DenseReference,
    Perplexity,
    dense_reference,
    rate_divergence,
)
from pho_service.pruning.proxy import AllocationProxy, ProxyEvaluator
from pho_service.pruning.statistics import Statistics
from pho_service.spec.configuration import ProxyQuality
from pho_service.spec.document import number
from pho_service.spec.objective import IN_FULL, WEIGHTINGS, Objective, corrected_windows
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import (
    MOST_DEPTHS,
    MOST_SHIFT,
    Allocation,
    Candidate,
    Reconstruction,
    Steps,
)
from pho_service.tuning.correction import Array, Correction, MeasuredPoint, next_point
from pho_service.tuning.finalists import (
    Divergences,
    Losses,
    confirmed_before,
    finalists,
    race_looks,
    race_order,
    still_racing,
    united,
)
from pho_service.tuning.plan import CORRECTS, Evaluate, Outcome, RatedCandidate
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import Islands, finished_trial
from pho_service.tuning.validation import qualities, random_candidates
from storage.studies import keep_record, kept, once


@dataclass(frozen=True, kw_only=True)
class Raced:
    """The finalists that are left, and what choosing them took."""

    # Best first by the objective; each gets a perplexity on the whole text.
    finalists: Sequence[RatedCandidate]
    # From the dense model, of all that were compared.
    divergences: Divergences = field(default_factory=Divergences)
    # What choosing and these perplexities take, in perplexities of the whole text.
    evaluations: float


def choose_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    subject: Subject,
    run: Run,
    *,
    entered: Sequence[RatedCandidate] = (),
) -> Raced:
    """Choose the finalists that get a perplexity on the whole text: those that a race leaves."""
    # They are measured a few windows at a time, in an order that the search's seed gives, and
    # whoever is behind the leader beyond chance is dropped, see
    # :mod:`pho_service.tuning.finalists`. What was measured is kept at once, so that another
    # attempt goes on. A streamed model is read again for each, whatever is measured, so its
    # finalists are measured on all windows.
    #
    # Where a text runs through the model for each pruning, that is what costs: finalists are
    # compared by their masks alone, and the best of them are pruned in full. At N:M masks alone do
    # not tell which finalist will be the best, so all are pruned in full.
    #
    # What a shorter search has measured on the same text stays a finalist, beside those that this
    # search would have had from the start.
    before = confirmed_before(islands, rated, text_sha256=subject.text.key)
    pool = united(rated, finalists(rated, count), before, entered)
    costly = any(each.candidate.steps.needs_text for each in pool)
    masks_alone = costly and not islands.plan.pattern.group
    stream = subject.model.stream
    compared = masks_alone or not (stream or costly)
    if len(pool) <= (IN_FULL if masks_alone else 1) or not compared:
        return Raced(finalists=pool, evaluations=float(len(pool)))
    if masks_alone:
        pool = [
            replace(each, candidate=replace(each.candidate, steps=each.candidate.steps.masked))
            for each in pool
        ]
    if stream:
        left = united(rated, _best_masks(islands, pool, subject, run), before)
        return Raced(finalists=left, evaluations=float(len(pool) + len(left)))
    race = _Race(islands, pool, subject, run, masks_alone=masks_alone)
    with run.progress("Racing finalists", len(pool) * race.windows) as advance:
        left = united(rated, race.run(advance), before)
    return Raced(finalists=left, divergences=race.divergences(), evaluations=race.evaluations(left))


def _best_masks(
    islands: Islands, pool: Sequence[RatedCandidate], subject: Subject, run: Run
) -> list[RatedCandidate]:
    """The finalists that are pruned in full, by the perplexity of each one's mask."""
    windows, statistics = subject.text.windows, subject.bundle.statistics()
    found: list[tuple[float, RatedCandidate]] = []
    with run.progress("Comparing masks", len(pool) * len(windows)) as advance:
        for each in pool:
            run.look()
            study, there = islands.place(each.number)

            def make(masked: Candidate = each.candidate) -> dict[str, float]:
                with named(masked):
                    rated, _ = rate_pruned(subject.model, statistics, masked, windows, advance)
                return {"perplexity": rated.perplexity}

            about = {"text_sha256": subject.text.key}
            stored = once(study, f"masks:perplexity:{there}", about, make, fence=run.fence)
            found.append((float(stored["perplexity"]), each))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])][:IN_FULL]


def known_losses(islands: Islands, number: int, text_sha256: str, kind: str = "") -> Losses:
    """Losses of a trial on single windows of a text, as far as a race has measured them."""
    study, there = islands.place(number)
    stored = kept(study, f"{kind}losses:{there}", {"text_sha256": text_sha256})
    return {int(window): blocks for window, blocks in stored.get("losses", {}).items()}


class _Race:
    """A race of finalists over the windows of a text."""

    def __init__(
        self,
        islands: Islands,
        pool: Sequence[RatedCandidate],
        subject: Subject,
        run: Run,
        *,
        masks_alone: bool,
    ) -> None:
        text = subject.text
        self.masks_alone = masks_alone
        self.kept = "masks:" if masks_alone else ""  # begins the names of its records
        self.islands, self.pool, self.text = islands, pool, text
        self.on = run
        self.windows = len(text.windows)
        self.order = race_order(self.windows, islands.plan.seed)
        self.compared = self.order[: compared_count(text.windows)]
        self.compared_key = ReportText(windows=text.windows[self.compared], record=text.record).key
        self.subject = subject
        self.seen: dict[int, int] = {}  # windows by number of the trial

    def run(self, advance: Advance) -> list[RatedCandidate]:
        """
        Those that cannot be told from the best before all windows are seen; of masks the best two.
        """
        looks = race_looks(self.windows, len(self.compared))
        glances = Glances(self.subject, lambda _: advance(0), self.compared)
        left, enough = [*self.pool], IN_FULL if self.masks_alone else 1
        for windows in looks[:-1]:
            if len(left) <= enough:
                break
            seen = self.order[:windows]
            losses = {each.number: self._measured(each, seen, glances, advance) for each in left}
            numbers = still_racing(losses, seen, windows=self.windows)
            advance((len(left) - len(numbers)) * (self.windows - windows))  # not to be run
            left = [each for each in left if each.number in numbers]
            if self.masks_alone:  # best first
                left.sort(key=lambda each: sum(map(sum, losses[each.number].values())))
        return left[:enough] if self.masks_alone else left

    def _measured(
        self, each: RatedCandidate, seen: Sequence[int], glances: Glances, advance: Advance
    ) -> Losses:
        """The losses of a finalist on some windows; those that are not known are measured."""
        key = self.text.key
        known = known_losses(self.islands, each.number, key, self.kept)
        missing = [number for number in seen if number not in known]
        if missing:
            self.on.look()
            with named(each.candidate):
                glance = glances(each.candidate, missing)
            known = {**known, **glance.losses}
            study, there = self.islands.place(each.number)
            with self.on.fence():
                if glance.divergence is not None:
                    about, value = {"text_sha256": self.compared_key}, glance.divergence
                    name, note = f"{self.kept}divergence:{there}", (there, "divergence")
                    once(study, name, about, lambda: {"divergence": value}, note=note)
                losses = {str(window): list(blocks) for window, blocks in known.items()}
                stored = {"text_sha256": key, "losses": losses}
                keep_record(study, f"{self.kept}losses:{there}", stored)
        advance(len(seen) - self.seen.get(each.number, 0))
        self.seen[each.number] = len(seen)
        return known

    def divergences(self) -> Divergences:
        """From the dense model, of all finalists."""
        by_number = {}
        for each in self.pool:
            study, there = self.islands.place(each.number)
            about = {"text_sha256": self.compared_key}
            stored = kept(study, f"{self.kept}divergence:{there}", about)
            if stored:
                by_number[each.number] = float(stored["divergence"])
        return Divergences(
            by_number=by_number, tokens=len(self.compared) * (self.text.windows.shape[1] - 1)
        )

    def evaluations(self, left: Sequence[RatedCandidate]) -> float:
        """What was run and what is still to be run, in perplexities of the whole text."""
        whole = {each.number for each in left}
        dense = len(self.compared) if self.seen else 0  # none for a text of one window
        if self.masks_alone:
            return (dense + sum(self.seen.values())) / self.windows + len(left)
        runs = sum(
            self.windows if each.number in whole else self.seen[each.number] for each in self.pool
        )
        return (dense + runs) / self.windows


@contextmanager
def named(candidate: Candidate) -> Iterator[None]:
    """Say of which candidate a number is NaN or infinite."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(
            str(error), layer=error.layer, candidate=candidate.to_dict()
        ) from error


# Between the search and the confirmation: correct the best allocation where the proxy is wrong.
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
    """Try other allocations of the best candidate, and compare each with the dense model."""
    # Candidates are compared as the score prunes them, without the steps after it. Each is a trial
    # of the study, recorded at once, so that another attempt goes on with the next; what is
    # proposed depends on the seed and on the trials before alone.
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

    def measured(self, allocation: Allocation, divergence: float) -> MeasuredPoint:
        offsets = [allocation.offsets.get(kind, 0.0) for kind in self._kinds(allocation)]
        rest = [0.0] * (MOST_DEPTHS - len(allocation.depth))
        point = np.array([*offsets, *allocation.depth, *rest])
        return MeasuredPoint(point=point, proxy=float(self.rate(point[None])[0]), value=divergence)

    def allocation(self, like: Allocation, point: Array) -> Allocation:
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
    """

    def __init__(
        self, model: LanguageModel, statistics: Statistics, windows: Tensor, advance: Advance
    ) -> None:
        self._model, self._statistics, self._advance = model, statistics, advance
        self._windows = windows[-corrected_windows(windows.shape[1]) :]

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
            trial=number,
            divergences=(before, after),
            count=len(trials),
            tokens=tokens,
        )


# The winner of a search, reconstructed: it takes minutes, so no other finalist is.
def reconstruct_winner(
    result: SearchResult,
    settings: Reconstruction,
    study: optuna.Study,
    subject: Subject | None,
    run: Run = Run(),
) -> SearchResult:
    """Add a reconstruction to what a search found, if it makes it better."""
    configuration = result.configuration
    steps = replace(configuration.steps, reconstruction=settings)
    rebuilt = configuration.model_copy(update={"steps": steps})
    confirmation = configuration.confirmation
    if subject is None or confirmation is None:
        return replace(result, configuration=rebuilt)
    before = confirmation.perplexity
    measured = measured_once(
        study,
        subject,
        rebuilt.candidate(),
        run,
        kept="reconstructed",
        title="Reconstructing the best",
        writes=True,
    )
    after = measured.perplexity
    if not after < before:
        warning = (
            f"The reconstruction was left out: with it the perplexity is {number(after)}, without "
            f"it {number(before)}. A lower learning rate or more samples may change that."
        )
        return replace(result, warnings=[*result.warnings, warning])
    told = confirmation.model_copy(update={"perplexity": after, "before_reconstruction": before})
    configuration = rebuilt.model_copy(update={"confirmation": told})
    return replace(result, configuration=configuration, losses=measured.losses)


def measured_once(
    study: optuna.Study,
    subject: Subject,
    candidate: Candidate,
    run: Run,
    *,
    kept: str,
    title: str,
    writes: bool = False,
) -> Perplexity:
    """The perplexity that the study holds; measured and kept at once if it is not there."""
    # So is what the model writes, if that is wanted, since pruning it again would take long.
    about = {"candidate": candidate.to_dict(), "text_sha256": subject.text.key}

    def make() -> dict[str, Any]:
        return _measure(subject, candidate, run, title, writes=writes)

    stored = once(study, kept, about, make, fence=run.fence)
    return Perplexity(**{each.name: stored[each.name] for each in fields(Perplexity)})


def _measure(
    subject: Subject, candidate: Candidate, run: Run, title: str, *, writes: bool
) -> dict[str, Any]:
    chosen = subject.bundle.choose(candidate.steps.linears, candidate.pattern)
    with (
        run.progress(title, len(chosen.names)) as advance,
        pruned_model(
            subject.model, subject.bundle.statistics(), candidate, subject.calibration, advance
        ),
    ):
        measured = measure_perplexity(
            subject.model, subject.text.windows, advance=lambda _: advance(0)
        )
        return {**asdict(measured), **(written_by(subject) if writes else {})}


# What it costs a search to permute only channels whose order can be folded into the weights.
def priced(
    result: SearchResult,
    study: optuna.Study,
    subject: Subject,
    run: Run = Run(),
) -> SearchResult:
    """Say of a result whose orders must fold what it would be with every order free."""
    configuration = result.configuration
    steps, confirmation = configuration.steps, configuration.confirmation
    if confirmation is None or not steps.gives_up_orders:
        return result
    chosen = subject.bundle.choose(steps.linears, configuration.candidate().pattern)
    given_up = len(chosen.names - subject.model.foldable)
    if not given_up:
        return result
    free = replace(configuration.candidate(), steps=replace(steps, deployable=False))
    perplexity = measured_once(
        study, subject, free, run, kept="any_order", title="Pruning in any order"
    ).perplexity
    sentence = (
        f"Deployable: {given_up} of {len(chosen.names)} linears keep the model's own order of "
        "channels, since no other one can be folded into their weights. The perplexity is "
        f"{number(confirmation.perplexity)}; permuted as well, which a runtime would have to do, "
        f"it would be {number(perplexity)}."
    )
    told = confirmation.model_copy(update={"any_order": perplexity})
    return replace(
        result,
        configuration=configuration.model_copy(update={"confirmation": told}),
        warnings=[*result.warnings, sentence],
    )


# Does the proxy rank? Random candidates rated by every proxy and by perplexity.
PROXIES = {
    **{
        f"activation-reconstruction/{weighting}": Objective(weighting=weighting)
        for weighting in WEIGHTINGS
    },
    "gini": Objective(name="gini"),
}


def rate_by_all_proxies(
    bundle: ProxyBundle,
    candidates: Sequence[Candidate],
    *,
    device: str,
    advance: Advance = lambda _: None,
) -> dict[str, list[float]]:
    """For each proxy, its value of each candidate."""
    evaluator = ProxyEvaluator(bundle, device)
    ratings = []
    for candidate in candidates:
        ratings += evaluator.evaluate([candidate], with_gini=True)
        advance(1)
    return {
        name: [proxy_value(rating, objective) for rating in ratings]
        for name, objective in PROXIES.items()
    }


def judge(
    bundle: ProxyBundle,
    candidates: Sequence[Candidate],
    perplexity: Sequence[float],
    *,
    seed: int,
    device: str,
) -> dict[str, ProxyQuality]:
    """How well each proxy ranks candidates whose perplexities are known."""
    return qualities(rate_by_all_proxies(bundle, candidates, device=device), perplexity, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Validation:
    candidates: list[Candidate]  # What was rated
    perplexity: list[float]  # Perplexity of each candidate
    proxies: dict[str, list[float]]  # For each proxy, its value of each candidate
    qualities: dict[str, ProxyQuality]  # For each proxy, how well it ranks


def validate_job(
    model: LanguageModel,
    bundle: ProxyBundle,
    text: ReportText,
    pattern: Pattern,
    *,
    linears: Linears = Linears(),
    bounds: Mapping[str, Any] | None = None,
    count: int = 40,
    seed: int = 0,
    calibration: Tensor | None = None,
    run: Run = Run(),
) -> Validation:
    """Rate random candidates both ways."""
    bundle.check_model(model.linears)
    space = SearchSpace(**{"kernel_sizes": bundle.kernel_sizes, **(bounds or {})}).fitted(pattern)
    candidates = random_candidates(space, pattern, count=count, seed=seed, linears=linears)
    with run.progress("Rating by the proxies", count) as advance:
        proxies = rate_by_all_proxies(bundle, candidates, device=run.device, advance=advance)
    perplexity = []
    statistics = bundle.statistics()
    with run.progress("Rating by perplexity", count) as advance:
        for candidate in candidates:
            result, _ = rate_pruned(
                model, statistics, candidate, text.windows, calibration=calibration
            )
            perplexity.append(result.perplexity)
            advance(1)
    return Validation(
        candidates=candidates,
        perplexity=perplexity,
        proxies=proxies,
        qualities=qualities(proxies, perplexity, seed=seed),
    )
