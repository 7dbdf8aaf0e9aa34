"""
`pho.curve` and `pho.search_within`: several sparsities of one model in one question.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna

from pho_service.host.files import write_json
from pho_service.interface.inputs import Model, calibrated, opened_bundle, opened_for, run_on
from pho_service.interface.minutes import search_clock, sized
from pho_service.interface.search import Given, SearchArguments, arguments, drawn
from pho_service.pipeline.curve import (
    CurvePoint,
    CurvePoints,
    Within,
    check_patterns,
    curve_document,
    find_points,
    opened_points,
    table_of,
    target_found,
)
from pho_service.pipeline.search import check_study_url
from pho_service.pipeline.work import Work
from pho_service.shown.parts import Drawn, Shown, Table
from pho_service.spec.curve import FEW_FINALISTS, LOWEST, STEP, Target, curve_patterns
from pho_service.spec.objective import Sampler
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Curve(Shown):
    """
    How good a model still is at each of several sparsities.

    Attributes:
        points: By sparsity; ``point.result`` is what the search there has found.
        study: Study of sparsity and objective, with the trials of all points; None if it is in the
            database that was given.
        document: The whole curve as JSON values, the configurations among them.
    """

    points: Sequence[CurvePoint]
    study: optuna.Study | None
    document: Mapping[str, Any]

    def write(self, path: str | Path) -> None:
        """
        Write the curve.json that `pho curve` writes.

        Raises:
            OutputError: The file cannot be written.
        """
        write_json(Path(path), self.document)

    def plot(self, path: str | Path | None = None) -> Drawn:
        """
        Draw the page with the plot that `pho curve` writes.

        A notebook shows what is returned; with ``path`` the page is written there, too.

        Raises:
            OutputError: The file cannot be written.
        """
        from pho_service.shown.page import curve_page

        return drawn(curve_page(self.document), path)

    def _records(self) -> Sequence[Mapping[str, Any]]:
        return [point.to_dict() for point in self.points]

    def _shown(self) -> Table:
        return table_of(self.points)


@dataclass(frozen=True, kw_only=True, eq=False)
class PointsArguments(SearchArguments):
    """
    Arguments of functions that search at several sparsities.

    Attributes:
        bundle: What ``pho.calibrate`` gave, or the path of its file.
        model: That of the bundle, in memory or by its name.
        sampler: A name; an object of Optuna would carry what it learnt into the next point.
        finalists: How many found candidates of each point are confirmed, beside the baselines;
            None takes 5, and 2 of a cut.
        study: URL of a database for the studies, where an interrupted curve goes on; None keeps
            them in memory.
        minutes: Time for all points together, on this machine, without the calibration: finalists
            and those pruned in full are chosen for it where they are not given. None: as many as
            the other arguments say.
    """

    bundle: Given = field(kw_only=False)
    model: Model
    sampler: Sampler = "cmaes"
    finalists: int | None = None
    study: str | None = None
    minutes: float | None = None

    def request(self, pattern: str | float | Pattern, **more: Any) -> SearchRequest:
        """The request of one point."""
        return super().request(pattern, sampler=self.sampler, finalists=self.finalists, **more)


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveArguments(PointsArguments):
    """
    Arguments of ``pho.curve``.

    Attributes:
        patterns: Shares of the weights to remove and N:M: ``[0.3, 0.5, 0.7, "2:4"]``; or cuts, as
            ``["structured:10%", "structured:20%"]``.
        scope: Scope of the ratios: ``row``, ``layer`` or ``global``; N:M has only ``row``.
    """

    patterns: Sequence[str | float | Pattern] = field(kw_only=False)
    finalists: int | None = FEW_FINALISTS


@arguments(CurveArguments)
def curve(ask: CurveArguments) -> Curve:
    """
    Search at several sparsities, and measure each beside the dense model, Wanda and RIA.

    The model is left dense. Each point is what ``pho.search`` finds in its pattern with the same
    options.

    Raises:
        InvalidInput: A pattern is not one, is given twice or does not fit the model; or as of
            ``pho.search``.
        ModelError, BundleError, TextError, StudyError: As of ``pho.search``.
    """
    unscoped = replace(ask, scope=None)
    requests = [unscoped.request(pattern) for pattern in curve_patterns(ask.patterns, ask.scope)]
    work = _work(ask, requests)
    if ask.minutes is not None:
        names = [str(request.pattern) for request in requests]
        clock = search_clock(ask, requests[0], work, patterns=names, scope=ask.scope)
        requests = [sized(request, clock) for request in requests]
    with _points(work, requests, ask) as (points, pareto):
        curve_points = find_points(points.find, requests)
        name = pareto.study_name
    study_place = {"url": ask.study, "name": name}
    return Curve(
        points=curve_points,
        study=pareto if ask.study is None else None,
        document=curve_document(curve_points, work, seconds=None, study=study_place),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class WithinArguments(PointsArguments):
    """
    Arguments of ``pho.search_within``.

    Attributes:
        perplexity_rise: Most that the perplexity may rise, as a share: 0.05 is 5 %.
        step: Distance of the sparsities that may be the answer, 0.005 to 0.25.
        lowest: The lowest of them.
        highest: The highest of them; None is 0.95, and 0.5 of a cut.
        structured: Cut neurons, heads and blocks, instead of removing single weights: sparsities
            are shares of the blocks' weights.
    """

    perplexity_rise: float = field(kw_only=False)
    step: float = STEP
    lowest: float = LOWEST
    highest: float | None = None
    structured: bool = False


@arguments(WithinArguments)
def search_within(ask: WithinArguments) -> Within:
    """
    Find the highest sparsity whose confirmed perplexity is within so much of the dense model's.

    Sparsities are bisected; each is searched and confirmed as by ``pho.search``. The answer was
    measured, and so was the sparsity one step above it, which is outside. Between measured ones the
    perplexity is assumed to rise with the sparsity.

    Raises:
        TargetMissed: The lowest sparsity is outside already.
        InvalidInput, ModelError, BundleError, TextError, StudyError: As of ``pho.curve``.
    """
    values = {name: getattr(ask, name) for name in Target.model_fields}
    target = Target.of(**{name: value for name, value in values.items() if value is not None})
    unscoped = replace(ask, scope=None)
    requests = [unscoped.request(pattern) for pattern in target.patterns(ask.scope)]
    work = _work(ask, requests)
    if ask.minutes is not None:
        document = target.model_dump(mode="json")
        clock = search_clock(ask, requests[0], work, target=document, scope=ask.scope)
        requests = [sized(request, clock) for request in requests]
    with _points(work, requests, ask, target) as (points, _):
        return target_found(target, find_points(points.find, requests, target))


def _work(ask: PointsArguments, requests: Sequence[SearchRequest]) -> Work:
    bundle = opened_bundle(ask.bundle)
    loaded = opened_for(bundle, ask.model, ask.tokenizer)
    check_patterns(loaded, [request.pattern for request in requests], requests[0].steps.linears)
    report = None if ask.report is None else (ask.report, ask.report_windows)
    return calibrated(loaded, bundle, ask.texts, ask.confirm, ask.confirm_windows, report)


def _points(
    work: Work,
    requests: Sequence[SearchRequest],
    ask: PointsArguments,
    target: Target | None = None,
) -> AbstractContextManager[tuple[CurvePoints, optuna.Study]]:
    if ask.study is not None:
        check_study_url(ask.study)
    run = run_on(work.model, ask.progress)
    return opened_points(ask.study, requests, work, run=run, target=target)
