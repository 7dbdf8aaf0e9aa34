"""
The main job as a function that is run from the top: search, confirm, give a configuration.
"""

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import optuna
from optuna.storages import RDBStorage

from pho_service.errors import BundleError, InvalidInput, NumericalError, StudyError, field_name
from pho_service.pipeline.in_time import NO_TIME, FinalistInTime, OutOfTime
from pho_service.pipeline.objectives import (
    KnownRatings,
    OwnObjective,
    joint_provenance,
    objective_function,
    rated_on,
    with_each_model,
)
from pho_service.pipeline.work import Work, only_one
from pho_service.progress import Advance, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Confirmation, ProxyQuality
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.perplexity import REFERENCES, Perplexities, Perplexity
from pho_service.spec.results import Chosen, Measured, PerplexityRequest, Searched
from pho_service.spec.steps import Allocation, Candidate
from pho_service.tuning.finalists import TRAINED, Divergences
from pho_service.tuning.plan import Evaluate, RatedCandidate, SearchPlan, SearchRequest
from pho_service.tuning.result import SearchResult, describe_study, mark_chosen, search_result
from pho_service.tuning.search import INHERITED, Callback, Islands, run_search, searched
from pho_service.tuning.validation import finalists_wanted, planned_candidates, qualities
from storage.records import REFERENCE_NUMBERS, VALIDATION
from storage.studies import (
    StorageError,
    check_url,
    keep_record,
    kept,
    once,
    open_storage,
    open_study,
    record_of,
)

# A job is a function that is run from the top: what its journal holds is not done again.
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One of several pieces of a job that do not depend on each other."""

    number: int = 0  # Tells it from the others with the same name
    about: Mapping[str, Any] = field(default_factory=dict)  # What to do, as JSON values
    lock: str | None = None  # Pieces with the same lock are done one after the other, of all jobs


class Journal:
    """Does each piece as it comes."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def each(
        self,
        name: str,
        pieces: Sequence[Piece],
        do: Callable[[Piece, Run], T],
        kind: type[T],
        *,
        title: str | None = None,
    ) -> list[T]:
        del name, kind
        if title is None or not pieces:
            return [do(piece, self.run) for piece in pieces]
        results = []
        with self.run.progress(title, len(pieces)) as advance:
            quiet = replace(self.run, progress=_within(advance))
            for piece in pieces:
                results.append(do(piece, quiet))
                advance(1)
        return results

    def once(self, name: str, do: Callable[[Run], T], kind: type[T]) -> T:
        """Return what a piece gives that is the only one of its name."""
        (result,) = self.each(name, [Piece()], lambda _, run: do(run), kind)
        return result


def _within(advance: Advance) -> Callable[[str, int], Any]:
    """Progress that only shows that something goes on."""

    @contextmanager
    def progress(title: str, steps: int) -> Iterator[Advance]:
        del title, steps
        yield lambda _: advance(0)

    return progress


# What the study of a search is called, and whose it is.
_ROWS = "bundle_rows_sha256"  # record of a study


def check_study_url(url: str) -> None:
    """See before any long work that a study may be kept at ``url``."""
    try:
        check_url(url)
    except StorageError as error:
        raise StudyError(f"{field_name('study', url)}: {error}") from error


def study_name(
    request: SearchRequest, plan: SearchPlan, provenance: Mapping[str, Any], rated_on: str = ""
) -> str:
    """Names a study after what it searches, so that the same request finds it again."""
    # The number of trials is left out: a longer search goes on with a shorter one.
    options = plan.identity()
    identity = [
        provenance.get("key", ""), str(plan.pattern), plan.pattern.scope,
        request.objective.label, plan.space.to_dict(),
        plan.sampler_name, options.pop("seed"), plan.fisher, rated_on, plan.steps.to_dict(),
        *([list(plan.warm_start)] if plan.warm_start else []), *([options] if options else []),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    model_name = Path(provenance.get("model", {}).get("name", "model")).name
    return f"{model_name} {plan.pattern} {plan.pattern.scope.value} {plan.sampler} {digest}"


def check_study(study: optuna.Study, bundles: Iterable[ProxyBundle]) -> None:
    """See that a study is of these bundles and no others, and note it in a new one."""
    # The key of a bundle is in the study's name. Who puts bundles together by hand may give two of
    # them the same, so the sampled weights are compared, too.
    bundles = [*bundles]
    rows = [bundle.rows_sha256 for bundle in bundles]
    recorded_rows = record_of(study).get(_ROWS)
    if recorded_rows is None:
        keep_record(study, _ROWS, rows)
    elif recorded_rows != rows:
        raise StudyError(
            f"study {study.study_name!r} is of a bundle with other weights under the same key, "
            f"{', '.join(bundle.key for bundle in bundles)}. Give each bundle's provenance a key "
            "of its own, or none, which names it by its contents; or use another "
            f"{field_name('study') or 'study'}."
        )


# What a result is judged by: the dense model, Wanda and RIA on the windows that chose the result.
@dataclass(frozen=True, kw_only=True)
class Reference:
    """Something that a result is judged by."""

    name: str  # ``dense``, ``wanda`` or ``ria``
    candidate: Candidate | None  # What the model is pruned with; None leaves it dense
    # The trial of the search that is the same candidate; None if no trial is.
    trial: int | None = None


def reference_record(name: str) -> str:
    """The record of a study that holds what was measured of the dense model, Wanda or RIA."""
    return f"reference:{name}"


def references(plan: SearchPlan, rated: Sequence[RatedCandidate]) -> list[Reference]:
    """What the result of a search is judged by; published baselines may be trials of it."""
    methods = reference_methods(plan.pattern, plan.steps.linears)
    judges = []
    for name in REFERENCES:
        candidate = methods.get(name)
        same = (r.number for r in rated if candidate and _prune_alike(r.candidate, candidate))
        judges.append(Reference(name=name, candidate=candidate, trial=next(same, None)))
    return judges


def _prune_alike(one: Candidate, other: Candidate) -> bool:
    """Whether two scores without a neighbourhood remove the same weights."""
    if one.coefficients.neighbourhood or one.pattern != other.pattern:
        return False
    sized = replace(one.coefficients, kernel_size=other.coefficients.kernel_size)
    even = replace(one.steps, allocation=Allocation())  # whose spread nothing uses
    steps = even if one.steps.allocation.is_even else one.steps
    return sized == other.coefficients and steps == other.steps


# By name: what the model is pruned with, None leaves it dense; its perplexity, or why it has none.
Judges = Mapping[str, tuple[Candidate | None, Perplexity | str]]


def with_perplexities(result: SearchResult, judges: Judges) -> SearchResult:
    """A confirmed result with the perplexities that it is judged by, or why there is none."""
    measured = {name: given for name, (_, given) in judges.items() if isinstance(given, Perplexity)}
    ria = judges["ria"][0] if "ria" in measured else None
    perplexities = result.measured and Perplexities.of(
        result.measured, measured, ria_scope=ria and ria.pattern.scope.value
    )
    if not perplexities:
        return result
    return replace(
        result,
        configuration=result.configuration.model_copy(update={"perplexities": perplexities}),
        warnings=[*result.warnings, *(why for _, why in judges.values() if isinstance(why, str))],
    )


# Brings a study to the trials of its plan; whether its time was up before.
IslandSearch = Callable[[optuna.Study, SearchPlan, Evaluate], bool]


def search_job(
    request: SearchRequest,
    work: Work,
    *,
    study: optuna.Study | None = None,
    callbacks: Sequence[Callback] = (),
    search: "IslandSearch | None" = None,
    run: Run = Run(),
) -> SearchResult:
    """Search, confirm, and say how good what was found is; goes on with what the study holds."""
    if request.pattern.structured:
        from pho_service.pipeline.cuts import search_cut  # loads transformers

        return search_cut(request, work, study or study_of(None, request, work), run)
    # On several bundles, a candidate's value is the mean, or the worst, over the models of its
    # proxy relative to RIA's on the same model: below 1 it is better. Nothing is confirmed then.
    plan = search_plan(request, work.bundles)
    if request.validation is not None and not work.measures:
        raise InvalidInput(
            "the proxy is validated by perplexities, which need the model and a text: give a model "
            f"instead of a bundle, and {field_name('confirm/text')}; or leave "
            f"{field_name('validation/candidates')} out."
        )
    if work.dense is not None:
        work.bundle.check_model(work.dense.linears)
    record = study or study_of(None, request, work)

    def at_once(study: optuna.Study, plan: SearchPlan, rate: Evaluate) -> bool:
        with run.progress(f"Searching ({request.objective.label})", plan.trials) as advance:
            run_search(study, plan, rate, advance, fence=run.fence, callbacks=callbacks)
        return False

    return conduct(
        IslandsAsked(
            requests=[request],
            plans=[plan],
            studies=lambda _: record,
            origin=origin(work),
        ),
        work,
        Journal(run),
        search or at_once,
        lambda result: result,
        SearchResult,
    )


@dataclass(frozen=True, kw_only=True)
class IslandsAsked:
    """What each island of a search is to do, and its record."""

    requests: Sequence[SearchRequest]
    plans: Sequence[SearchPlan]
    studies: Callable[[int], optuna.Study]  # The record of an island
    origin: Mapping[str, Any]  # Where what is searched comes from, see :func:`origin_of`
    timeout_s: float | None = None  # Time limit of each island


def conduct(
    brief: IslandsAsked,
    work: Work,
    journal: Journal,
    search: IslandSearch,
    finished: Callable[[SearchResult], T],
    kind: type[T],
) -> T:
    """The way of every search for coefficients; see :func:`conduct_pieces`."""
    steps = _SearchPieces(brief, work, search)
    return conduct_pieces(steps, len(brief.plans), journal, finished, kind)


class SearchPieces(Protocol):
    """The pieces of a search, each of which may be done elsewhere."""

    def search(self, piece: Piece, run: Run) -> Searched: ...

    def validation(self) -> list[Piece]: ...

    def choose(self, validated: Sequence[Measured], run: Run) -> Chosen: ...

    def measure(self, piece: Piece, run: Run) -> Measured: ...

    def finish(
        self, done: Sequence[Searched], chosen: Chosen, measured: Sequence[Measured], run: Run
    ) -> SearchResult: ...


def conduct_pieces(
    steps: SearchPieces,
    count: int,
    journal: Journal,
    finished: Callable[[SearchResult], T],
    kind: type[T],
) -> T:
    """The way of every search: on the command line, in Python, and in a service."""
    islands = [Piece(number=number) for number in range(count)]
    searched = journal.each("search", islands, steps.search, Searched)
    validated = journal.each(
        "perplexity", steps.validation(), steps.measure, Measured,
        title="Validating the proxy by perplexity",
    )  # fmt: skip
    chosen = journal.once("confirm", lambda run: steps.choose(validated, run), Chosen)
    measured = journal.each(
        "perplexity", [_piece(wanted) for wanted in chosen.wanted], steps.measure, Measured,
        title="Confirming by perplexity",
    )  # fmt: skip
    return journal.once(
        "finish", lambda run: finished(steps.finish(searched, chosen, measured, run)), kind
    )


def _piece(wanted: PerplexityRequest) -> Piece:
    about = {"candidate": wanted.candidate, "trial": wanted.trial}
    return Piece(number=wanted.number, about=about)


class _SearchPieces:
    """The pieces of a search."""

    def __init__(self, brief: IslandsAsked, work: Work, search: IslandSearch) -> None:
        self._brief, self._work, self._search = brief, work, search
        self._request, self._plan = brief.requests[0], brief.plans[0]
        self._by_perplexity = self._request.objective.name == "perplexity"

    @cached_property
    def _islands(self) -> Islands:
        plans = self._brief.plans
        return Islands([self._brief.studies(number) for number in range(len(plans))], plans)

    @cached_property
    def _measured(self) -> Work | None:
        """What perplexities are measured of; None if none are to be."""
        return self._work.opened() if self._work.measures else None

    @cached_property
    def _judging(self) -> set[int | None]:
        """The trials that a result is judged by, whether they are finalists or not."""
        return {judge.trial for judge in references(self._plan, self._islands.ranked())}

    def search(self, piece: Piece, run: Run) -> Searched:
        """Search on one island, or go on with it."""
        request, plan = self._brief.requests[piece.number], self._brief.plans[piece.number]
        study, bundles = self._brief.studies(piece.number), self._work.bundles
        rated = Work(bundles=bundles)  # no model is read for a proxy
        if self._by_perplexity or isinstance(request.objective, OwnObjective):
            rated = self._work.opened()
        rate = objective_function(request.objective, plan, rated, run.device)
        check_study(study, bundles.values())
        describe_study(study, request, plan, self._brief.origin)
        rated_on = [str(self._brief.origin.get("key", ""))]
        rated_on += [bundle.rows_sha256 for bundle in bundles.values()]
        rated_on += [self._work.text.key] if self._by_perplexity else []
        ratings = KnownRatings(study, request, plan, rated_on)
        out_of_time = self._search(study, plan, ratings.before(rate))
        if self._by_perplexity:
            self._work.check()
        return Searched(
            trials=len(searched(study, plan)), out_of_time=out_of_time, rated_before=ratings.taken
        )

    def validation(self) -> list[Piece]:
        """The perplexities of random candidates, which the proxy is validated by."""
        if self._request.validation is None:
            return []
        candidates = planned_candidates(self._plan, self._request.validation)
        return [
            _piece(PerplexityRequest(number=VALIDATION + i, candidate=candidate.to_dict()))
            for i, candidate in enumerate(candidates)
        ]

    def measure(self, piece: Piece, run: Run) -> Measured:
        """Measure a perplexity; the study keeps it at once."""
        from pho_service.pipeline.confirmation import known_losses, named
        from pho_service.pipeline.rating import measure

        work, trial = self._measured, piece.about.get("trial")
        assert work is not None  # else none is wanted
        given, text = piece.about["candidate"], work.text
        candidate = given and Candidate.from_dict(given, self._plan.pattern)
        # Each of these may win, and pruning it again only to write would take as long once more.
        writes = piece.number < VALIDATION and candidate.steps.needs_text
        study, key, note = self._record(piece.number)
        in_time = None
        if writes and trial is not None and trial not in self._judging:
            in_time = FinalistInTime(self._islands.studies[0], trial, text.key, run)
            if not (kept(study, key, {"text_sha256": text.key}) or in_time.begins()):
                return Measured(perplexity=None, failure=NO_TIME)

        def make() -> dict[str, Any]:
            run.look()
            raced_losses = {} if trial is None else known_losses(self._islands, trial, text.key)
            with run.progress("Measuring", len(text.windows)) as advance:
                advance(len(raced_losses))
                if in_time:
                    chosen = work.bundle.choose(candidate.steps.linears, candidate.pattern)
                    advance = in_time.watched(advance, len(chosen.names))
                try:
                    with named(candidate) if candidate else nullcontext():
                        measurement = measure(
                            work, candidate, advance, raced_losses=raced_losses, writes=writes
                        )
                except NumericalError as error:
                    if candidate is None or piece.number < REFERENCE_NUMBERS:
                        raise
                    name = REFERENCES[piece.number - REFERENCE_NUMBERS]
                    return {  # no fault of the result
                        "perplexity": None,
                        "failure": f"The result is not compared with {name}, which has no "
                        f"perplexity here: {error}",
                    }
            self._work.check()  # before it is kept
            names = ("perplexity", "sparsity", "seconds", "losses", "written")
            return {name: getattr(measurement, name) for name in names}

        try:
            stored = once(study, key, {"text_sha256": text.key}, make, fence=run.fence, note=note)
        except OutOfTime:
            return Measured(perplexity=None, failure=NO_TIME)
        names = [each.name for each in fields(Measured) if each.name in stored]
        return Measured(
            **{"measured_on": text.measured_on(), **{name: stored[name] for name in names}},
            weights_sha256=self._work.check(),
        )

    def _record(self, number: int) -> tuple[optuna.Study, str, tuple[int, str] | None]:
        """Where a perplexity is kept: the study, the name, and the trial that it is of."""
        first = self._islands.studies[0]
        if number >= REFERENCE_NUMBERS:
            return first, reference_record(REFERENCES[number - REFERENCE_NUMBERS]), None
        if number >= VALIDATION:
            assert self._request.validation is not None
            seed = self._request.validation.seed
            return first, f"validation:{seed}:{number - VALIDATION}", None
        study, there = self._islands.place(number)
        return study, f"perplexity:{there}", (there, "perplexity")

    def choose(self, validated: Sequence[Measured], run: Run) -> Chosen:
        """Choose whose perplexities are measured."""
        islands, request = self._islands, self._request
        rated = islands.ranked()
        if self._measured is None:
            return Chosen()
        count, doubt, validation = request.finalists, None, None
        if request.validation is not None:
            validation = self._judged(request.validation, validated, run)
            name = request.objective.label
            if name in validation:
                count, doubt = finalists_wanted(count, name, validation[name])
        if self._by_perplexity:
            measured = {r.number for r in rated}
            wanted = self._judges(rated, measured)
            return Chosen(wanted=wanted, validation=validation, doubt=doubt)
        from pho_service.pipeline.confirmation import choose_finalists  # loads transformers

        raced = choose_finalists(islands, rated, count, self._measured, run)
        if raced.divergences.by_number:
            self._work.check()
        finalists = [
            PerplexityRequest(number=r.number, candidate=r.candidate.to_dict(), trial=r.number)
            for r in raced.finalists
            if not request.steps.trained_at_once(len(raced.finalists))
        ]
        numbers = [r.number for r in raced.finalists]
        return Chosen(
            finalists=numbers,
            wanted=[*finalists, *self._judges(rated, {*numbers})],
            divergences=dict(raced.divergences.by_number),
            divergence_tokens=raced.divergences.tokens,
            evaluations=raced.evaluations,
            validation=validation,
            doubt=doubt,
        )

    def _judged(
        self, validation: ValidationSpec, validated: Sequence[Measured], run: Run
    ) -> dict[str, ProxyQuality]:
        """How well each proxy ranks the random candidates."""
        from pho_service.pipeline.confirmation import rate_by_all_proxies  # loads transformers

        bundle = only_one(self._work.bundles, "a validation")
        perplexities = [float(measurement.perplexity or math.nan) for measurement in validated]
        candidates = planned_candidates(self._plan, validation)
        proxies = rate_by_all_proxies(bundle, candidates, device=run.device)
        return qualities(proxies, perplexities, seed=validation.seed)

    def _judges(
        self, rated: Sequence[RatedCandidate], measured: Container[int]
    ) -> list[PerplexityRequest]:
        """What a result is judged by, but for trials that have a perplexity or get one."""
        return [
            PerplexityRequest(
                number=REFERENCE_NUMBERS + i,
                candidate=None if judge.candidate is None else judge.candidate.to_dict(),
                trial=judge.trial,
            )
            for i, judge in enumerate(references(self._plan, rated))
            if judge.trial is None or judge.trial not in measured
        ]

    def finish(
        self, done: Sequence[Searched], chosen: Chosen, measured: Sequence[Measured], run: Run
    ) -> SearchResult:
        """Choose the best of all that was found, and write down how, and what is known of it."""
        islands, request = self._islands, self._request
        rated = islands.ranked()
        measured_by_number = {
            wanted.number: value for wanted, value in zip(chosen.wanted, measured, strict=True)
        }
        at_once = [r for r in rated if r.number in {*chosen.finalists} - {*measured_by_number}]
        measured_by_number |= {r.number: self._trained(r, run) for r in at_once}
        perplexities, measured_on = self._perplexities(rated, chosen, measured_by_number)
        confirmed = sorted(
            ((perplexities[r.number], r) for r in rated if r.number in perplexities),
            key=lambda pair: pair[0].perplexity,
        )
        confirmation, best = None, rated[0]
        if confirmed:
            perplexity, best = confirmed[0]
            confirmation = Confirmation(perplexity=perplexity.perplexity, **measured_on)
        study, number = islands.place(best.number)
        finished, out_of_time = islands.finished, any(island.out_of_time for island in done)
        result = search_result(
            request,
            islands.plan,
            self._brief.origin,
            study.study_name,
            rated,
            confirmed,
            confirmation,
            Divergences(by_number=chosen.divergences, tokens=chosen.divergence_tokens),
            ended_after=finished if finished < islands.asked and not out_of_time else None,
        )
        if request.objective.over is not None:
            result = with_each_model(result, islands.attributes(rated[0].number)["relative_to_ria"])
        more: dict[str, Any] = {}
        if len(islands.studies) > 1:
            more = {"islands": len(islands.studies), "island": islands.of_island(best.number)}
        if out_of_time:
            more = {**more, "timeout_s": self._brief.timeout_s, "finished": finished}
        if fork := kept(islands.studies[0], INHERITED, {}):
            more = {**more, "fork": fork}
        search = {**result.configuration.search, **more}
        configuration = result.configuration.model_copy(update={"search": search})
        result = replace(result, configuration=configuration, trial=number)
        judged = measured_by_number.get(best.number)
        written = [] if judged is None else judged.written
        result = self._looked_at_again(result, written, run, at_once=bool(at_once))
        judges = self._judged_by(rated, perplexities, measured_by_number)
        result = self._reported(with_perplexities(result, judges), judges, run)
        for island_study in islands.studies:
            with run.fence():
                mark_chosen(island_study, result.configuration, result.study_name, result.trial)
        return replace(
            result,
            rated_before=sum(island.rated_before for island in done),
            validation=chosen.validation,
            warnings=[*result.warnings, *([chosen.doubt] if chosen.doubt else [])],
        )

    def _trained(self, finalist: RatedCandidate, run: Run) -> Measured:
        """The perplexity of the only finalist, which is trained at once."""
        from pho_service.pipeline.confirmation import reconstruct  # loads transformers

        work, settings = self._measured, self._request.steps.reconstruction
        assert work is not None  # else there is no finalist
        study, there = self._islands.place(finalist.number)
        first, on_text = self._islands.studies[0], work.text.measured_on()
        rating = reconstruct(finalist.candidate, settings, first, work, run)
        once(  # it stays a finalist of a longer search
            study, f"{TRAINED}:{there}", {"text_sha256": work.text.key},
            lambda: {"perplexity": rating.perplexity}, fence=run.fence, note=(there, "perplexity"),
        )  # fmt: skip
        return Measured(
            perplexity=rating.perplexity, measured_on=on_text, losses=[*rating.losses],
            text_sha256=rating.text_sha256, weights_sha256=self._work.check(),
        )  # fmt: skip

    def _perplexities(
        self, rated: Sequence[RatedCandidate], chosen: Chosen, measured: Mapping[int, Measured]
    ) -> tuple[dict[int, Perplexity], dict[str, Any]]:
        """The perplexities that decide, by trial, and what they were measured on."""
        if self._by_perplexity:
            text, key = self._work.text.measured_on(), self._work.text.key
            finalists = {
                r.number: Measured(perplexity=r.value, measured_on=text, text_sha256=key)
                for r in rated
            }
        else:
            finalists = {number: measured[number] for number in chosen.finalists}
            text = {**next((finalist.measured_on for finalist in finalists.values()), {})}
            late = sum(finalist.perplexity is None for finalist in finalists.values())
            text |= {"evaluations": chosen.evaluations - late}
            text |= {"divergence_tokens": chosen.divergence_tokens}
        ratings = {number: finalist.rating for number, finalist in finalists.items()}
        return {number: rating for number, rating in ratings.items() if rating}, text

    def _judged_by(
        self,
        rated: Sequence[RatedCandidate],
        perplexities: Mapping[int, Perplexity],
        measured: Mapping[int, Measured],
    ) -> Judges:
        """What a result is judged by."""
        by_name: dict[str, tuple[Candidate | None, Perplexity | str]] = {}
        for i, judge in enumerate(references(self._plan, rated)):
            piece = measured.get(REFERENCE_NUMBERS + i)
            if judge.trial is not None and judge.trial in perplexities:
                by_name[judge.name] = judge.candidate, perplexities[judge.trial]
            elif piece is not None:
                by_name[judge.name] = judge.candidate, piece.rating or str(piece.failure)
            # Of a method's published variants the best that was measured, so that none wins
            # against itself.
            variants = [
                (r.candidate, perplexities[r.number])
                for r in sorted(rated, key=lambda r: r.number)
                if r.number in perplexities and r.candidate.method.startswith(judge.name)
                if judge.candidate is not None and r.candidate.steps == judge.candidate.steps
            ]
            candidate, before = by_name.get(judge.name, (None, ""))
            if isinstance(before, Perplexity):
                both = [(candidate, before), *variants]
                by_name[judge.name] = min(both, key=lambda pair: pair[1].perplexity)
        return by_name

    def _reported(self, result: SearchResult, judges: Judges, run: Run) -> SearchResult:
        """With what was measured on the report text, if there is one."""
        work = self._measured
        if work is None or work.report is None or result.configuration.perplexities is None:
            return result
        from pho_service.pipeline.confirmation import reported  # loads transformers

        candidates = {name: c for name, (c, given) in judges.items() if not isinstance(given, str)}
        result = reported(result, candidates, self._islands.studies[0], work, run)
        self._work.check()
        return result

    def _looked_at_again(
        self, result: SearchResult, written: Sequence[str], run: Run, *, at_once: bool
    ) -> SearchResult:
        """With what orders that fold cost it, reconstructed if that is better, and writing."""
        steps, study, work = self._request.steps, self._islands.studies[0], self._measured
        if work is None and not steps.reconstruction.wanted:
            return result
        from pho_service.pipeline.confirmation import (
            priced,  # loads transformers
            reconstruct_winner,
            with_continuations,
        )

        if work is not None:
            result = priced(result, study, work, run)
        if steps.reconstruction.wanted:
            result = reconstruct_winner(
                result, steps.reconstruction, study, work, run, at_once=at_once
            )
        if work is not None:
            result = with_continuations(result, written, study, work, run)
            self._work.check()
        return result


@contextmanager
def opened_study(url: str | None, request: SearchRequest, work: Work) -> Iterator[optuna.Study]:
    name = name_of_study(request, work)  # what cannot be searched is refused before a file is made
    with opened_studies(url) as storage:
        yield open_study(storage, name, direction=request.objective.direction)


@contextmanager
def opened_studies(url: str | None) -> Iterator[RDBStorage | None]:
    """Open a database of studies, with what the storage says turned into ours; None is memory."""
    if url is None:
        yield None
        return
    try:
        with open_storage(url) as storage:
            yield storage
    except StorageError as error:
        raise StudyError(f"{field_name('study', url)}: {error}") from error


def study_of(storage: RDBStorage | None, request: SearchRequest, work: Work) -> optuna.Study:
    """Make the study of a search, in memory or in a database; or open it if it is there."""
    # Its name says what is searched: the same request on the same bundles finds it again.
    return open_study(storage, name_of_study(request, work), direction=request.objective.direction)


def name_of_study(request: SearchRequest, work: Work) -> str:
    if request.pattern.structured:
        provenance = origin(work)
        model_name = Path(provenance.get("model", {}).get("name", "model")).name
        return f"{model_name} {request.pattern} {str(provenance.get('key', ''))[:10]}"
    plan = search_plan(request, work.bundles)
    return study_name(request, plan, origin(work), rated_on(request, work.confirm))


def search_plan(request: SearchRequest, bundles: Mapping[str, ProxyBundle]) -> SearchPlan:
    """The plan of a search on bundles, in the kernel sizes that all of them have."""
    first, *others = (set(bundle.kernel_sizes) for bundle in bundles.values())
    common = tuple(sorted(first.intersection(*others)))
    if not common:
        raise BundleError(
            f"the bundles {', '.join(bundles)} have no kernel size in common. Calibrate them with "
            f"the same {field_name('calibration/kernel_sizes')}."
        )
    if len(bundles) > 1 and request.objective.over is None:
        raise InvalidInput("a search over several models needs to be told how they count: over.")
    plan = request.plan(common)
    for bundle in bundles.values():
        bundle.choose(plan.steps.linears, plan.pattern)
    return plan


def origin_of(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return where a search's bundles come from: one's provenance, or that of all together."""
    return dict(provenances[0]) if len(provenances) == 1 else joint_provenance(provenances)


def origin(work: Work) -> dict[str, Any]:
    """Return where the bundles of a search come from."""
    return origin_of([bundle.origin for bundle in work.bundles.values()])
