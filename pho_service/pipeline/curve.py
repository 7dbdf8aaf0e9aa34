"""
Several sparsities of one model, and the highest that is still good enough.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from pydantic import TypeAdapter

from pho_service.errors import TargetMissed, field_name
from pho_service.models.loading import LanguageModel
from pho_service.models.structure import Anatomy, block_shapes
from pho_service.pipeline.cuts import check_goal
from pho_service.pipeline.prune import winner_of
from pho_service.pipeline.search import (
    IslandSearch,
    Journal,
    Piece,
    name_of_study,
    opened_studies,
    reference_record,
    search_job,
    study_of,
)
from pho_service.pipeline.work import Work
from pho_service.progress import Advance, Run, never
from pho_service.shown.parts import Shown, Table
from pho_service.shown.tables import points_table, rise_of
from pho_service.spec.configuration import Configuration
from pho_service.spec.curve import Target
from pho_service.spec.document import number
from pho_service.spec.pattern import Linears, Pattern
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import add_point, pareto_name, pareto_study
from storage.records import PATTERN
from storage.studies import keep_record, kept, once

FORMAT = "pho-curve"
DENSE_MEASURED = reference_record("dense")
_TIME = "curve_time"  # record of a study

# Gives the study of a search, which may hold a part of it already.
Record = Callable[[SearchRequest], optuna.Study]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Result of a model at one sparsity."""

    pattern: str  # As text
    scope: str  # Where weights compete
    sparsity: float  # The share of the weights that the pattern removes
    # Perplexity of the best that was found, on the report text if there is one; of a target, which
    # is looked for by it, on the text of the confirmation.
    perplexity: float
    rise: float  # Rise of the perplexity over the dense model's, as a share of that
    rise_error: float | None = None  # Standard error of the rise, of paired differences
    errors: Mapping[str, float] = field(default_factory=dict)  # As of ``Perplexities``
    measured_on: str | None = None  # Which text, in short; versions before did not say it
    # Perplexity of the dense model, on the same windows. wanda, ria: Perplexities of these methods
    # on the same windows; None where one gives NaN.
    dense: float
    wanda: float | None
    ria: float | None
    proxy: float  # The objective's value of the best
    trials: int  # Trials of its search
    seconds: float  # What search, confirmation and published methods took, interruptions left out
    study: str  # The study of its search, and the number of the best in it
    trial: int
    configuration: Configuration  # The best
    warnings: list[str]  # Plain sentences that a user must read

    @property
    def result(self) -> SearchResult:
        """What the search at this sparsity has found."""
        return SearchResult(
            configuration=self.configuration,
            study_name=self.study,
            trial=self.trial,
            warnings=self.warnings,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the configuration among them."""
        document: dict[str, Any] = TypeAdapter(CurvePoint).dump_python(self, mode="json")
        return document


class CurvePoints:
    """Finds points one after the other; what the studies hold is not done again."""

    def __init__(
        self,
        work: Work,
        record: Record,
        *,
        pareto: optuna.Study | None = None,
        run: Run = Run(),
        dense: Mapping[str, Any] | None = None,
        search: IslandSearch | None = None,
        target: Target | None = None,
        before: Sequence[CurvePoint] = (),
    ) -> None:
        self._work, self._record, self._pareto = work, record, pareto
        self._run, self._dense, self._search = run, dense, search
        self._target, self._points = target, [*before]

    def find(self, request: SearchRequest, title: str) -> CurvePoint:
        """Search, confirm, and measure the published methods beside."""
        work, study = self._work, self._record(request)
        about = {"text_sha256": work.text.key}
        dense = self._dense
        if dense:  # what another search's study has of the dense model on these windows
            once(study, DENSE_MEASURED, about, lambda: dense)
        with _timed(study, request, work.text.key) as seconds:
            result = search_job(
                request, work, study=study, search=self._search, run=_titled(self._run, title)
            )
        if self._pareto is not None:
            pattern = request.pattern
            add_point(self._pareto, study, pattern.sparsity, str(pattern), self._run.fence)
        configuration = result.configuration
        perplexities = configuration.perplexities
        if self._target is None:
            perplexities = configuration.headline
        assert perplexities is not None  # there is a text
        self._dense = kept(study, DENSE_MEASURED, about)
        point = CurvePoint(
            pattern=configuration.pattern,
            scope=request.pattern.scope.value,
            sparsity=request.pattern.sparsity,
            perplexity=perplexities.pruned,
            **perplexities.point,
            proxy=configuration.objective["value"],
            trials=request.trials,
            seconds=seconds(),
            study=result.study_name,
            trial=result.trial,
            configuration=configuration,
            warnings=[*result.warnings],
        )
        self._points.append(point)
        self._forget_blocks()
        return point

    def _forget_blocks(self) -> None:
        """Keep only those trained blocks that the answer of a target may be made of."""
        # Of earlier points there are those of the answer until now at most.
        before, answer = self._answer(self._points[:-1]), self._answer(self._points)
        for point in (before, self._points[-1]):
            if point is not None and point is not answer:
                blocks = self._work.blocks(winner_of(point.configuration))
                if blocks is not None:
                    blocks.remove()

    def _answer(self, points: Sequence[CurvePoint]) -> CurvePoint | None:
        """What a target has of these points; of a curve nobody knows which will be pruned to."""
        target = self._target
        inside = [point for point in points if target is not None and is_inside(target, point)]
        return max(inside, key=lambda point: point.sparsity, default=None)


def find_points(
    find: Callable[[SearchRequest, str], CurvePoint],
    requests: Sequence[SearchRequest],
    target: Target | None = None,
    journal: Journal | None = None,
) -> list[CurvePoint]:
    """A point for each request, by itself; or for those that the bisection of a target asks for."""
    points: list[CurvePoint] = []

    def points_of(batch: Sequence[SearchRequest]) -> list[CurvePoint]:
        numbered = dict(enumerate(batch, len(points)))
        pieces = [Piece(number=n, about={PATTERN: str(r.pattern)}) for n, r in numbered.items()]

        def do(piece: Piece, _: Run) -> CurvePoint:
            suffix = f"{piece.number + 1} of {len(batch)}" if target is None else f"for {target}"
            request = numbered[piece.number]
            return find(request, f"{request.pattern}, {suffix}")

        return (journal or Journal(Run())).each("point", pieces, do, CurvePoint)

    if target is None:
        return points_of(requests)
    named = {request.pattern.sparsity: request for request in requests}
    while (sparsity := next_sparsity(target, points)) is not None:
        points += points_of([named[sparsity]])
    return points


@contextmanager
def opened_points(
    url: str | None,
    requests: Sequence[SearchRequest],
    work: Work,
    *,
    run: Run,
    target: Target | None = None,
    note: Callable[[optuna.Study, SearchRequest], None] = never,
) -> Iterator[tuple[CurvePoints, optuna.Study]]:
    """What finds the points, and the study of (sparsity, objective) that takes all their trials."""
    # They are kept in a database, or in memory if ``url`` is None. ``note`` is called with the
    # study of each search before it begins.
    names = [name_of_study(request, work) for request in requests]
    name, request = pareto_name(Path(work.model.name).name, names), requests[0]
    with opened_studies(url) as storage:
        pareto = pareto_study(name, request.objective.direction, request.rated_by, storage)

        def record(request: SearchRequest) -> optuna.Study:
            study = study_of(storage, request, work)
            note(study, request)
            return study

        yield CurvePoints(work, record, pareto=pareto, run=run, target=target), pareto


def curve_document(
    points: Sequence[CurvePoint],
    work: Work,
    *,
    seconds: float | None,
    study: Mapping[str, Any],
) -> dict[str, Any]:
    text = work.text
    return {
        "format": FORMAT,
        "version": 1,
        "model": dict(work.bundle.provenance.get("model", {})),
        "dense": points[0].dense,
        "confirmation": {**text.measured_on(), "text_sha256": text.key},
        **({} if work.report is None else {"report": work.report.measured_on()}),
        "calibration": {"key": work.bundle.key, "seconds": seconds},
        "study": dict(study),
        "points": [point.to_dict() for point in points],
    }


def point_warnings(points: Sequence[CurvePoint]) -> list[str]:
    """The warnings of all searches, each with the patterns that it is of."""
    by_text: dict[str, list[str]] = {}
    for point in points:
        for warning in point.warnings:
            by_text.setdefault(warning, []).append(point.pattern)
    return [f"({', '.join(patterns)}) {text}" for text, patterns in by_text.items()]


def check_patterns(model: LanguageModel, patterns: Sequence[Pattern], linears: Linears) -> None:
    """See before any long work that all patterns fit a model."""
    for pattern in patterns:
        if pattern.structured:
            pattern.splits(block_shapes(Anatomy(model)))
            check_goal(pattern, model)
        chosen = linears.choose(list(model.linears), pattern, model=model.name)
        for name in model.linears:
            if name in chosen.names:
                pattern.check_width(model.linears[name].weight.shape[1], name)


def _titled(run: Run, title: str) -> Run:
    def titled(step: str, steps: int) -> AbstractContextManager[Advance]:
        return run.progress(f"[{title}] {step}", steps)

    return replace(run, progress=titled)


@contextmanager
def _timed(
    study: optuna.Study, request: SearchRequest, text_sha256: str
) -> Iterator[Callable[[], float]]:
    """Keep in a study what its point takes; what is interrupted adds up."""
    identity = [request.trials, request.finalists, request.in_full, text_sha256]
    record = kept(study, _TIME, {})
    done = record.get("done") == identity
    before, started = float(record.get("seconds", 0.0)), time.monotonic()
    taken = before
    try:
        yield lambda: round(taken, 3)
        record = {"done": identity}
    finally:
        if not done:
            taken = before + time.monotonic() - started
            keep_record(study, _TIME, {"done": record.get("done"), "seconds": taken})


# The highest sparsity that is still good enough, by bisection on confirmed points.
ASSUMED = (
    "Between the measured sparsities the perplexity is assumed to rise with the sparsity: those "
    "that lie between are not measured."
)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Within(Shown):
    """
    The highest sparsity that is within a target, and all points that were measured for it.

    ``found.result`` is what the search at the answer has found, for ``pho.prune``.
    """

    target: Target  # What was asked
    points: Sequence[CurvePoint]  # All that were measured, by sparsity
    answer: CurvePoint  # The sparsest of them that is within the target
    # The next sparser one, which is not; None if the answer is the highest sparsity that may be
    # tried.
    outside: CurvePoint | None

    def _records(self) -> Sequence[Mapping[str, Any]]:
        return [point.to_dict() for point in self.points]

    def _shown(self) -> Table:
        shown = table_of(self.points)
        answer = (
            f"answer: {self.answer.pattern}, {rise_of(self.answer)}, within "
            f"{self.target}; at most {number(self.target.limit(self.answer.dense))} was wanted"
        )
        return replace(
            shown, notes=(answer, *shown.notes, *(f"Note: {warning}" for warning in self.warnings))
        )

    @property
    def result(self) -> SearchResult:
        """Result of the answer's search, with the target and its points in it."""
        result = self.answer.result
        target = {
            **self.target.model_dump(),
            "dense": self.answer.dense,
            "limit": self.target.limit(self.answer.dense),
            "points": [
                {"sparsity": point.sparsity, "perplexity": point.perplexity}
                for point in self.points
            ],
        }
        search = {**result.configuration.search, "target": target}
        configuration = result.configuration.model_copy(update={"search": search})
        return replace(
            result, configuration=configuration, warnings=[*result.warnings, *self.warnings]
        )

    @property
    def warnings(self) -> list[str]:
        """Plain sentences that a user must read."""
        sentences = [ASSUMED]
        for point in (self.answer, self.outside):
            if point is None or point.rise_error is None:
                continue
            if abs(point.rise - self.target.perplexity_rise) < 2 * point.rise_error:
                sentences.append(
                    f"The perplexity at {point.pattern} is statistically tied with the target, "
                    f"{self.target}: confirm on more windows to be surer."
                )
        if self.outside is None:
            sentences.append(
                f"{self.answer.pattern} is the highest sparsity that was tried, and it is within "
                f"{self.target}: a sparser model may be within it, too."
            )
        falls = [b for a, b in pairwise(self.points) if b.perplexity < a.perplexity]
        if falls:
            sentences.append(
                f"The perplexity at {falls[0].pattern} is below that of a lower sparsity, so it "
                "does not rise everywhere: more windows to confirm on or more trials make it surer."
            )
        return sentences


def table_of(points: Sequence[CurvePoint]) -> Table:
    """A row for each point, with the text that its perplexities are of."""
    return points_table([point.to_dict() for point in points], points[0].configuration)


# The sparsities of a target are bisected, so that about log2 of them are searched. The answer was
# measured, and so was the sparsity one step above it, which is outside.
def next_sparsity(target: Target, points: Sequence[CurvePoint]) -> float | None:
    """The sparsity that the bisection asks for next; None if the points say the answer."""
    sparsities = target.sparsities
    inside = {sparsities.index(point.sparsity): is_inside(target, point) for point in points}
    number = next_asked(len(sparsities), inside)
    return None if number is None else sparsities[number]


def target_found(target: Target, points: Sequence[CurvePoint]) -> Within:
    """The answer that the points say, after the last one that :func:`next_sparsity` asks for."""
    ordered = sorted(points, key=lambda point: point.sparsity)
    inside = [point for point in ordered if is_inside(target, point)]
    if not inside:
        raise TargetMissed(_missed(target, ordered))
    sparser = (point for point in ordered if point.sparsity > inside[-1].sparsity)
    return Within(target=target, points=ordered, answer=inside[-1], outside=next(sparser, None))


def next_asked(count: int, inside: Mapping[int, bool]) -> int | None:
    """Return the number that a bisection of ``count`` numbers from 0 asks for next."""
    # It looks for the last number inside; all that follow one outside are outside, too. None at the
    # end, when both that number and the one after it were asked for.
    low, high = -1, count  # inside, outside
    while high - low > 1:
        middle = (low + high) // 2
        if middle not in inside:
            return middle
        low, high = (middle, high) if inside[middle] else (low, middle)
    return None


def is_inside(target: Target, point: CurvePoint) -> bool:
    return point.perplexity <= target.limit(point.dense)


def _missed(target: Target, points: Sequence[CurvePoint]) -> str:
    shown = ", ".join(f"{number(point.perplexity)} at {point.pattern}" for point in points)
    dense = points[0].dense
    better = f"search with a better {field_name('preset')}, such as best"
    if target.structured:
        better = f"a smaller cut: {field_name('target/lowest', target.step)}"
    return (
        f"no sparsity is within {target}: the dense model's perplexity is {number(dense)}, so at "
        f"most {number(target.limit(dense))} is wanted, and already the lowest sparsity, "
        f"{target.lowest:g}, is above. Measured: {shown}. Allow a higher rise, or {better}."
    )
