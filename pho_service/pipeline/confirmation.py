"""
From the best by the proxy to the result: the race and the validation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import optuna

from pho_service.errors import NumericalError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.texts import ReportText
from pho_service.pipeline.in_time import Shortening, in_time, trained
from pho_service.pipeline.objectives import proxy_value
from pho_service.pipeline.pipeline import Shorten, pruned_model, trained_blocks
from pho_service.pipeline.rating import Glances, compared_count, rate_pruned
from pho_service.pipeline.work import Work
from pho_service.pipeline.writing import prompts_of, side_by_side, written_by
from pho_service.progress import Advance, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.configuration import Configuration, ProxyQuality
from pho_service.spec.document import number
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import WEIGHTINGS, Objective
from pho_service.spec.perplexity import Perplexity, ReportedPerplexities
from pho_service.spec.steps import Candidate, Reconstruction
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
from pho_service.tuning.plan import RatedCandidate, SearchPlan
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import Islands
from pho_service.tuning.validation import planned_candidates, qualities
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
    work: Work,
    run: Run,
) -> Raced:
    """Choose the finalists that get a perplexity on the whole text: those that a race leaves."""
    # They are measured a few windows at a time, in an order that the search's seed gives, and
    # whoever is behind the leader beyond chance is dropped, see
    # :mod:`pho_service.tuning.finalists`. What was measured is kept at once, so that another
    # attempt goes on. A streamed model is read again for each, whatever is measured, so its
    # finalists are measured on all windows.
    #
    # Where a text runs through the model for each pruning, that is what costs: finalists are
    # compared by their masks alone, and the best of them are pruned in full.
    #
    # What a shorter search has measured on the same text stays a finalist, beside those that this
    # search would have had from the start.
    before = confirmed_before(islands, rated, text_sha256=work.text.key)
    pool = united(rated, finalists(rated, count), before)
    costly = any(r.candidate.steps.needs_text for r in pool)
    in_full = islands.plan.pruned_in_full(len(pool), islands.plan.pattern)
    masks_alone = costly and in_full < len(pool)
    stream = work.model.stream
    if len(pool) <= 1 or (not masks_alone and (stream or costly)):
        fewer = [r for n in range(1, count + 1) for r in finalists(rated, n)]
        return Raced(finalists=_with_first(fewer, pool), evaluations=float(len(pool)))
    if masks_alone:
        pool = [
            replace(r, candidate=replace(r.candidate, steps=r.candidate.steps.masked)) for r in pool
        ]
    if stream:
        best = _best_masks(islands, pool, work, run)[:in_full]
        left = _with_first(best, united(rated, best, before))
        return Raced(finalists=left, evaluations=float(len(pool) + len(left)))
    race = _Race(islands, pool, work, run, masks_alone=masks_alone)
    with run.progress("Racing finalists", len(pool) * race.windows) as advance:
        best = race.run(advance)
    if masks_alone:
        best = best[:in_full]
        best = best[: in_time(islands.studies[0], "in_full", len(best), run.in_full, run)]
    left = _with_first(best, united(rated, best, before))
    return Raced(finalists=left, divergences=race.divergences(), evaluations=race.evaluations(left))


def _with_first(
    first: Sequence[RatedCandidate], pool: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """Those of a pool with some first, in their order: there may not be time for all."""
    numbers = [*dict.fromkeys(r.number for r in first)]
    order = {number: place for place, number in enumerate(numbers)}
    return sorted(pool, key=lambda r: order.get(r.number, len(order)))


def _best_masks(
    islands: Islands, pool: Sequence[RatedCandidate], work: Work, run: Run
) -> list[RatedCandidate]:
    """The finalists by the perplexity of each one's mask, best first."""
    windows, statistics = work.text.windows, work.bundle.statistics()
    by_perplexity: list[tuple[float, RatedCandidate]] = []
    with run.progress("Comparing masks", len(pool) * len(windows)) as advance:
        for finalist in pool:
            run.look()
            study, there = islands.place(finalist.number)

            def make(masked: Candidate = finalist.candidate) -> dict[str, float]:
                with named(masked):
                    rated, _ = rate_pruned(work.model, statistics, masked, windows, advance)
                return {"perplexity": rated.perplexity}

            about = {"text_sha256": work.text.key}
            stored = once(study, f"masks:perplexity:{there}", about, make, fence=run.fence)
            by_perplexity.append((float(stored["perplexity"]), finalist))
    return [r for _, r in sorted(by_perplexity, key=lambda pair: pair[0])]


def known_losses(islands: Islands, number: int, text_sha256: str, kind: str = "") -> Losses:
    """Losses of a trial on single windows of a text, as far as a race has measured them."""
    study, there = islands.place(number)
    stored = kept(study, f"{kind}losses:{there}", {"text_sha256": text_sha256})
    return {int(window): blocks for window, blocks in stored.get("losses", {}).items()}


class _Race:
    """A race of finalists over the windows of a text."""

    def __init__(
        self, islands: Islands, pool: Sequence[RatedCandidate], work: Work, run: Run,
        *, masks_alone: bool,
    ) -> None:  # fmt: skip
        text = work.text
        self.masks_alone = masks_alone
        self.kept = "masks:" if self.masks_alone else ""  # begins the names of its records
        self.islands, self.pool, self.text = islands, pool, text
        self.watched = run
        self.windows = len(text.windows)
        self.order = race_order(self.windows, islands.plan.seed)
        self.compared = self.order[: compared_count(text.windows)]
        self.compared_key = ReportText(windows=text.windows[self.compared], record=text.record).key
        self.work = work
        self.seen: dict[int, int] = {}  # windows by number of the trial

    def run(self, advance: Advance) -> list[RatedCandidate]:
        """Those that are not told from the best before the last window; of masks all in order."""
        looks = race_looks(self.windows, len(self.compared))
        glances = Glances(self.work, lambda _: advance(0), self.compared)
        # The best masks are the same however many of them there is time for.
        left, behind = [*self.pool], list[RatedCandidate]()
        for windows in looks[:-1]:
            if len(left) <= 1:
                break
            seen = self.order[:windows]
            losses = {r.number: self._measured(r, seen, glances, advance) for r in left}
            numbers = still_racing(losses, seen, windows=self.windows)
            advance((len(left) - len(numbers)) * (self.windows - windows))  # not to be run
            if self.masks_alone:  # best first
                left.sort(key=lambda r: sum(map(sum, losses[r.number].values())))
                behind = [*(r for r in left if r.number not in numbers), *behind]
            left = [r for r in left if r.number in numbers]
        return [*left, *behind]

    def _measured(
        self, finalist: RatedCandidate, seen: Sequence[int], glances: Glances, advance: Advance
    ) -> Losses:
        """The losses of a finalist on some windows; those that are not known are measured."""
        key = self.text.key
        window_losses = known_losses(self.islands, finalist.number, key, self.kept)
        missing = [number for number in seen if number not in window_losses]
        if missing:
            self.watched.look()
            with named(finalist.candidate):
                glance = glances(finalist.candidate, missing)
            window_losses = {**window_losses, **glance.losses}
            study, there = self.islands.place(finalist.number)
            with self.watched.fence():
                if glance.divergence is not None:
                    about, value = {"text_sha256": self.compared_key}, glance.divergence
                    name, note = f"{self.kept}divergence:{there}", (there, "divergence")
                    once(study, name, about, lambda: {"divergence": value}, note=note)
                losses = {str(window): list(blocks) for window, blocks in window_losses.items()}
                stored = {"text_sha256": key, "losses": losses}
                keep_record(study, f"{self.kept}losses:{there}", stored)
        advance(len(seen) - self.seen.get(finalist.number, 0))
        self.seen[finalist.number] = len(seen)
        return window_losses

    def divergences(self) -> Divergences:
        """From the dense model, of all finalists."""
        by_number, about = {}, {"text_sha256": self.compared_key}
        for finalist in self.pool:
            study, there = self.islands.place(finalist.number)
            if stored := kept(study, f"{self.kept}divergence:{there}", about):
                by_number[finalist.number] = float(stored["divergence"])
        return Divergences(
            by_number=by_number, tokens=len(self.compared) * (self.text.windows.shape[1] - 1)
        )

    def evaluations(self, left: Sequence[RatedCandidate]) -> float:
        """What was run and what is still to be run, in perplexities of the whole text."""
        run = sum(self.seen.values()) + (len(self.compared) if self.seen else 0)  # and the dense
        begun = 0 if self.masks_alone else sum(self.seen.get(r.number, 0) for r in left)
        return (run - begun) / self.windows + len(left)


@contextmanager
def named(candidate: Candidate) -> Iterator[None]:
    """Say of which candidate a number is NaN or infinite."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(
            str(error), layer=error.layer, candidate=candidate.to_dict()
        ) from error


# The winner of a search, reconstructed: it takes minutes, so no other finalist is.
RECONSTRUCTED = "reconstructed"  # record of a study: the perplexity of its winner


def reconstruct(
    candidate: Candidate, settings: Reconstruction, study: optuna.Study, work: Work, run: Run
) -> Perplexity:
    """The perplexity of a winner that is reconstructed."""
    asked = trained(candidate, settings, study, run)
    # What the model writes is kept, too, since training it again would take long.
    record = kept(study, RECONSTRUCTED, _about(asked, work))
    if not record:
        blocks = len(trained_blocks(work.model, asked))
        shorten = None
        if run.trains_on and not settings.blocks:
            shorten = Shortening(candidate, study, run, blocks)
        made = _measure(work, asked, run, "Reconstructing the best", writes=True, shorten=shorten)
        record = {**made, **_about(trained(candidate, settings, study, run), work)}
        with run.fence():
            keep_record(study, RECONSTRUCTED, record)
    return _perplexity_of(record)


def reconstruct_winner(
    result: SearchResult,
    settings: Reconstruction,
    study: optuna.Study,
    work: Work | None,
    run: Run = Run(),
    *,
    at_once: bool = False,
) -> SearchResult:
    """Add a reconstruction to what a search found, if it makes it better, or has it already."""
    configuration = result.configuration
    confirmation = configuration.confirmation

    def rebuilt() -> Configuration:
        winner = trained(configuration.candidate(), settings, study, run)
        return configuration.model_copy(update={"steps": winner.steps})

    if work is None or confirmation is None or result.measured is None or at_once:
        return replace(result, configuration=rebuilt())
    before = confirmation.perplexity
    measured = reconstruct(configuration.candidate(), settings, study, work, run)
    after = measured.perplexity
    # One that time has left alone is trained as the only one that is asked for: whatever it gives.
    alone = sum(each.perplexity is not None for each in configuration.finalists) == 1
    if not (after < before or alone):
        if kept := work.blocks(rebuilt().candidate()):
            kept.remove()
        warning = (
            f"The reconstruction was left out: with it the perplexity is {number(after)}, without "
            f"it {number(before)}. A lower learning rate or more samples may change that."
        )
        return replace(result, warnings=[*result.warnings, warning])
    new_confirmation = confirmation.measured_against(
        "before_reconstruction", measured.against(result.measured)
    )
    configuration = rebuilt().model_copy(update={"confirmation": new_confirmation})
    return replace(result, configuration=configuration, measured=measured)


_STORED = ("perplexity", "tokens", "windows", "losses")  # beside what they are about


def reported(
    result: SearchResult,
    judges: Mapping[str, Candidate | None],
    study: optuna.Study,
    work: Work,
    run: Run = Run(),
) -> SearchResult:
    """Measure the result and what it is judged by on a text that nothing was chosen on."""
    ratings, warnings = {}, []
    for name, candidate in {**judges, "pruned": result.configuration.candidate()}.items():
        run.look()
        try:
            ratings[name] = measured_once(
                study, replace(work, confirm=work.report), candidate, run,
                kept=f"report:{name}", title=f"Measuring {name} on the report text",
            )  # fmt: skip
        except NumericalError as error:
            if name in ("dense", "pruned"):
                raise
            warnings.append(f"The report has no {name}, which has no perplexity there: {error}")
    result = replace(result, warnings=[*result.warnings, *warnings])
    return with_report(result, ratings, work, judges.get("ria"))


def with_report(
    result: SearchResult,
    ratings: Mapping[str, Perplexity],
    work: Work,
    ria: Candidate | None = None,
) -> SearchResult:
    """A result with perplexities on a report text, of which some windows may be left out."""
    text, references = work.report, {**ratings}
    assert text is not None
    measured_on = {name: text.measured_on()[name] for name in ("tokens", "context_length", "text")}
    report = ReportedPerplexities.of(
        references.pop("pruned"), references, ria_scope=ria and ria.pattern.scope.value,
        **measured_on,
    )  # fmt: skip
    warnings, left_out = [*result.warnings], text.record.left_out
    if left_out:
        warnings.append(
            f"The report text shares passages with what was calibrated or chosen on: {left_out} of "
            "its first windows were left out."
        )
    configuration = result.configuration.model_copy(update={"report": report})
    return replace(result, configuration=configuration, warnings=warnings)


def measured_once(
    study: optuna.Study,
    work: Work,
    candidate: Candidate | None,
    run: Run,
    *,
    kept: str,
    title: str,
) -> Perplexity:
    """The perplexity that the study holds; measured and kept at once if it is not there."""

    def make() -> dict[str, Any]:
        return _measure(work, candidate, run, title, writes=False)

    return _perplexity_of(once(study, kept, _about(candidate, work), make, fence=run.fence))


def _about(candidate: Candidate | None, work: Work) -> dict[str, Any]:
    """What a record of a perplexity is about; None is the dense model."""
    pruning = None if candidate is None else candidate.to_dict()
    return {"candidate": pruning, "text_sha256": work.text.key}


def _perplexity_of(record: Mapping[str, Any]) -> Perplexity:
    return Perplexity(**{name: record[name] for name in (*_STORED, "text_sha256")})


def _measure(
    work: Work,
    candidate: Candidate | None,
    run: Run,
    title: str,
    *,
    writes: bool,
    shorten: Shorten | None = None,
) -> dict[str, Any]:
    model, windows, statistics = work.model, work.text.windows, work.bundle.statistics()
    names = frozenset({"dense"})
    if candidate is not None:
        names = work.bundle.choose(candidate.steps.linears, candidate.pattern).names
    with ExitStack() as stack:
        advance = stack.enter_context(run.progress(title, len(names)))
        if candidate is not None:
            calibration, blocks = work.calibration, work.blocks(candidate)
            stack.enter_context(
                pruned_model(model, statistics, candidate, calibration, advance, blocks, shorten)
            )
        measured = measure_perplexity(model, windows, advance=lambda _: advance(0))
        said = written_by(model, windows) if writes else {}
        return {**{name: getattr(measured, name) for name in _STORED}, **said}


def with_continuations(
    result: SearchResult,
    written: Sequence[str],
    study: optuna.Study,
    work: Work,
    run: Run = Run(),
) -> SearchResult:
    """Add what the dense and the pruned model write, which may be known; the study keeps it."""
    model, candidate = work.model, result.configuration.candidate()
    windows = work.text.windows
    if prompts_of(model, windows) is None:
        return result
    text = {"text_sha256": work.text.key}
    about = {**text, "candidate": candidate.to_dict()}

    def prune_and_write() -> dict[str, Any]:
        calibration, statistics = work.calibration, work.bundle.statistics()
        with pruned_model(model, statistics, candidate, calibration, lambda _: advance(0)):
            return written_by(model, windows)

    with run.progress("Writing with both models", 2) as advance:
        run.look()
        dense = once(
            study, "written:dense", text, lambda: written_by(model, windows), fence=run.fence
        )
        advance(1)
        # A winner that was pruned with a text has written when it was measured.
        stored = kept(study, RECONSTRUCTED, about) or ({"written": written} if written else {})
        pruned = stored or once(study, "written", about, prune_and_write, fence=run.fence)
        advance(1)
    continuations = side_by_side(model, windows, dense=dense, pruned=pruned)
    configuration = result.configuration.model_copy(update={"continuations": continuations})
    return replace(result, configuration=configuration)


# What it costs a search to permute only channels whose order can be folded into the weights.
def priced(
    result: SearchResult,
    study: optuna.Study,
    work: Work,
    run: Run = Run(),
) -> SearchResult:
    """Say of a result whose orders must fold what it would be with every order free."""
    configuration = result.configuration
    steps, confirmation = configuration.steps, configuration.confirmation
    if confirmation is None or result.measured is None or not steps.gives_up_orders:
        return result
    chosen = work.bundle.choose(steps.linears, configuration.candidate().pattern)
    given_up = len(chosen.names - work.model.foldable)
    if not given_up:
        return result
    free = replace(configuration.candidate(), steps=replace(steps, deployable=False))
    measured = measured_once(study, work, free, run, kept="any_order", title="Pruning in any order")
    new_confirmation = confirmation.measured_against("any_order", result.measured.against(measured))
    sentence = (
        f"Deployable: {given_up} of {len(chosen.names)} linears keep the model's own order of "
        "channels, since no other one can be folded into their weights. The perplexity is "
        f"{number(new_confirmation.perplexity)}; permuted as well, which a runtime would have to "
        f"do, it would be {new_confirmation.beside('any_order')}."
    )
    return replace(
        result,
        configuration=configuration.model_copy(update={"confirmation": new_confirmation}),
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


@dataclass(frozen=True, kw_only=True)
class Validation:
    candidates: list[Candidate]  # What was rated
    perplexity: list[float]  # Perplexity of each candidate
    proxies: dict[str, list[float]]  # For each proxy, its value of each candidate
    qualities: dict[str, ProxyQuality]  # For each proxy, how well it ranks


def validate_job(
    work: Work, plan: SearchPlan, validation: ValidationSpec, *, run: Run = Run()
) -> Validation:
    """Rate random candidates of a search both ways."""
    work.bundle.check_model(work.model.linears)
    candidates = planned_candidates(plan, validation)
    with run.progress("Rating by the proxies", len(candidates)) as advance:
        proxies = rate_by_all_proxies(work.bundle, candidates, device=run.device, advance=advance)
    perplexity = []
    statistics, windows = work.bundle.statistics(), work.text.windows
    with run.progress("Rating by perplexity", len(candidates)) as advance:
        for candidate in candidates:
            result, _ = rate_pruned(
                work.model, statistics, candidate, windows, calibration=work.calibration
            )
            perplexity.append(result.perplexity)
            advance(1)
    return Validation(
        candidates=candidates,
        perplexity=perplexity,
        proxies=proxies,
        qualities=qualities(proxies, perplexity, seed=validation.seed),
    )
