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
from optuna.storages import BaseStorage
from pydantic import TypeAdapter

from pho_service.errors import StudyError, TargetMissed, field_name
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.search import (
    IslandSearch,
    Journal,
    Piece,
    name_of_study,
    reference_record,
    search_job,
)
from pho_service.pipeline.work import Work
from pho_service.progress import Advance, Run
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
from storage.studies import StorageError, keep_record, kept, once, open_storage, record_of

FORMAT = "pho-curve"
DENSE_MEASURED = reference_record("dense")
_TIME = "curve_time"  # record of a study

# Opens the study of a search, which may hold a part of it already.
Record = Callable[[SearchRequest], AbstractContextManager[optuna.Study]]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Result of a model at one sparsity."""

    pattern: str  # As text
    scope: str  # Where weights compete
    sparsity: float  # The share of the weights that the pattern removes
    perplexity: float  # Perplexity of the best that was found, as it was confirmed
    rise: float  # Rise of the perplexity over the dense model's, as a share of that
    rise_error: float | None = None  # Standard error of the rise, of paired differences
    errors: Mapping[str, float] = field(default_factory=dict)  # As of ``Perplexities``
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
        found: dict[str, Any] = TypeAdapter(CurvePoint).dump_python(self, mode="json")
        return found


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
        self._target, self._found = target, [*before]

    def find(self, request: SearchRequest, title: str) -> CurvePoint:
        """Search, confirm, and measure the published methods beside."""
        work = self._work
        with self._record(request) as study:
            about = {"text_sha256": work.text.key}
            known = self._dense
            if known:  # what another search's study has of the dense model on these windows
                once(study, DENSE_MEASURED, about, lambda: known)
            with _timed(study, request, work.text.key) as seconds:
                result = search_job(
                    request,
                    work,
                    study=study,
                    search=self._search,
                    run=_titled(self._run, title),
                )
            if self._pareto is not None:
                pattern = request.pattern
                add_point(self._pareto, study, pattern.sparsity, str(pattern), self._run.fence)
        found = result.configuration
        assert found.perplexities is not None  # there is a text
        self._dense = kept(study, DENSE_MEASURED, about)
        point = CurvePoint(
            pattern=found.pattern,
            scope=request.pattern.scope.value,
            sparsity=request.pattern.sparsity,
            perplexity=found.perplexities.pruned,
            rise=found.perplexities.rise,
            rise_error=found.perplexities.error("dense"),
            errors=found.perplexities.errors,
            dense=found.perplexities.dense,
            wanda=found.perplexities.wanda,
            ria=found.perplexities.ria,
            proxy=found.objective["value"],
            trials=request.trials,
            seconds=seconds(),
            study=result.study_name,
            trial=result.trial,
            configuration=found,
            warnings=[*result.warnings],
        )
        self._found.append(point)
        self._forget_blocks()
        return point

    def _forget_blocks(self) -> None:
        """Keep only those trained blocks that the answer of a target may be made of."""
        # Of earlier points there are those of the answer until now at most.
        before, answer = self._answer(self._found[:-1]), self._answer(self._found)
        for each in (before, self._found[-1]):
            if each is not None and each is not answer:
                blocks = self._work.blocks(each.configuration.candidate())
                if blocks is not None:
                    blocks.remove()

    def _answer(self, points: Sequence[CurvePoint]) -> CurvePoint | None:
        """What a target has of these points; of a curve nobody knows which will be pruned to."""
        target = self._target
        inside = [each for each in points if target is not None and is_inside(target, each)]
        return max(inside, key=lambda each: each.sparsity, default=None)


def find_points(
    find: Callable[[SearchRequest, str], CurvePoint],
    requests: Sequence[SearchRequest],
    target: Target | None = None,
    journal: Journal | None = None,
) -> list[CurvePoint]:
    """A point for each request, by itself; or for those that the bisection of a target asks for."""
    found: list[CurvePoint] = []

    def each(asked: Sequence[SearchRequest]) -> list[CurvePoint]:
        numbered = dict(enumerate(asked, len(found)))
        pieces = [Piece(number=n, about={PATTERN: str(r.pattern)}) for n, r in numbered.items()]

        def do(piece: Piece, _: Run) -> CurvePoint:
            of = f"{piece.number + 1} of {len(asked)}" if target is None else f"for {target}"
            request = numbered[piece.number]
            return find(request, f"{request.pattern}, {of}")

        return (journal or Journal(Run())).each("point", pieces, do, CurvePoint)

    if target is None:
        return each(requests)
    named = {request.pattern.sparsity: request for request in requests}
    while (sparsity := next_sparsity(target, found)) is not None:
        found += each([named[sparsity]])
    return found


@contextmanager
def opened_pareto(
    url: str, requests: Sequence[SearchRequest], work: Work
) -> Iterator[optuna.Study]:
    """Open the study of (sparsity, objective) that takes the trials of some searches."""
    try:
        with open_storage(url) as storage:
            yield pareto_of(requests, work, storage)
    except StorageError as error:
        raise StudyError(f"{field_name('study', url)}: {error}") from error


def pareto_of(
    requests: Sequence[SearchRequest], work: Work, storage: BaseStorage | None
) -> optuna.Study:
    names = [name_of_study(each, work) for each in requests]
    model = Path(work.model.name).name
    objective = requests[0].objective
    return pareto_study(pareto_name(model, names), objective.direction, objective.label, storage)


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
        "calibration": {"key": work.bundle.key, "seconds": seconds},
        "study": dict(study),
        "points": [each.to_dict() for each in points],
    }


def point_warnings(points: Sequence[CurvePoint]) -> list[str]:
    """The warnings of all searches, each with the patterns that it is of."""
    by_text: dict[str, list[str]] = {}
    for each in points:
        for warning in each.warnings:
            by_text.setdefault(warning, []).append(each.pattern)
    return [f"({', '.join(patterns)}) {text}" for text, patterns in by_text.items()]


def check_patterns(model: LanguageModel, patterns: Sequence[Pattern], linears: Linears) -> None:
    """See before any long work that all patterns fit a model."""
    for pattern in patterns:
        chosen = linears.choose(list(model.linears), pattern, model=model.name)
        for name in model.linears:
            if name in chosen.names:
                pattern.check_width(model.linears[name].weight.shape[1], name)


def _titled(run: Run, title: str) -> Run:
    def told(step: str, steps: int) -> AbstractContextManager[Advance]:
        return run.progress(f"[{title}] {step}", steps)

    return replace(run, progress=told)


@contextmanager
def _timed(
    study: optuna.Study, request: SearchRequest, text_sha256: str
) -> Iterator[Callable[[], float]]:
    """Keep in a study what its point takes; what is interrupted adds up."""
    of = [request.trials, request.finalists, request.in_full, text_sha256]
    kept: Mapping[str, Any] = record_of(study).get(_TIME, {})
    done = kept.get("done") == of
    before, started = float(kept.get("seconds", 0.0)), time.monotonic()
    taken = before
    try:
        yield lambda: round(taken, 3)
        kept = {"done": of}
    finally:
        if not done:
            taken = before + time.monotonic() - started
            keep_record(study, _TIME, {"done": kept.get("done"), "seconds": taken})


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
        return [each.to_dict() for each in self.points]

    def _shown(self) -> Table:
        shown = table_of(self.points)
        answer = (
            f"answer: {self.answer.pattern}, {rise_of(self.answer)}, within "
            f"{self.target}; at most {number(self.target.limit(self.answer.dense))} was wanted"
        )
        return replace(
            shown, notes=(answer, *shown.notes, *(f"Note: {each}" for each in self.warnings))
        )

    @property
    def result(self) -> SearchResult:
        """Result of the answer's search, with the target and its points in it."""
        found = self.answer.result
        told = {
            **self.target.model_dump(),
            "dense": self.answer.dense,
            "limit": self.target.limit(self.answer.dense),
            "points": [
                {"sparsity": each.sparsity, "perplexity": each.perplexity} for each in self.points
            ],
        }
        search = {**found.configuration.search, "target": told}
        configuration = found.configuration.model_copy(update={"search": search})
        return replace(
            found, configuration=configuration, warnings=[*found.warnings, *self.warnings]
        )

    @property
    def warnings(self) -> list[str]:
        """Plain sentences that a user must read."""
        told = [ASSUMED]
        for each in (self.answer, self.outside):
            if each is None or each.rise_error is None:
                continue
            if abs(each.rise - self.target.perplexity_rise) < 2 * each.rise_error:
                told.append(
                    f"The perplexity at {each.pattern} is not told apart from the target, "
                    f"{self.target}: more windows to confirm on make it surer."
                )
        if self.outside is None:
            told.append(
                f"{self.answer.pattern} is the highest sparsity that was tried, and it is within "
                f"{self.target}: a sparser model may be, too."
            )
        falls = [b for a, b in pairwise(self.points) if b.perplexity < a.perplexity]
        if falls:
            told.append(
                f"The perplexity at {falls[0].pattern} is below that of a lower sparsity, so it "
                "does not rise everywhere: more windows to confirm on or more trials make it surer."
            )
        return told


def table_of(points: Sequence[CurvePoint]) -> Table:
    """A row for each point, with the text that its perplexities are of."""
    return points_table([each.to_dict() for each in points], points[0].configuration.confirmation)


# The sparsities of a target are bisected, so that about log2 of them are searched. The answer was
# measured, and so was the sparsity one step above it, which is outside.
def next_sparsity(target: Target, points: Sequence[CurvePoint]) -> float | None:
    """The sparsity that the bisection asks for next; None if the points say the answer."""
    sparsities = target.sparsities
    inside = {sparsities.index(each.sparsity): is_inside(target, each) for each in points}
    number = next_asked(len(sparsities), inside)
    return None if number is None else sparsities[number]


def target_found(target: Target, points: Sequence[CurvePoint]) -> Within:
    """The answer that the points say, after the last one that :func:`next_sparsity` asks for."""
    ordered = sorted(points, key=lambda each: each.sparsity)
    inside = [each for each in ordered if is_inside(target, each)]
    if not inside:
        raise TargetMissed(_missed(target, ordered))
    sparser = (each for each in ordered if each.sparsity > inside[-1].sparsity)
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
    shown = ", ".join(f"{number(each.perplexity)} at {each.pattern}" for each in points)
    dense = points[0].dense
    return (
        f"no sparsity is within {target}: the dense model's perplexity is {number(dense)}, so at "
        f"most {number(target.limit(dense))} is wanted, and already the lowest sparsity, "
        f"{target.lowest:g}, is above. Measured: {shown}. Allow a higher rise, or search with a "
        f"better {field_name('preset')}, such as best."
    )
