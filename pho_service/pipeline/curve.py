"""
One calibration, a search for each pattern: how good a model still is at each sparsity.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from pho_service.errors import StudyError
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.rating import Subject
from pho_service.pipeline.search import IslandSearch, name_of_study, search_job
from pho_service.progress import Advance, Run
from pho_service.spec.configuration import Configuration
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern
from pho_service.tuning.pareto import add_point, pareto_name, pareto_study
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import SearchResult
from storage.studies import StorageError, keep_record, once, open_storage, record_of

FORMAT = "pho-curve"
_TIME = "curve_time"  # record of a study

# Opens the study of a search, which may hold a part of it already.
Record = Callable[[SearchRequest], AbstractContextManager[optuna.Study]]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """
    Result of a model at one sparsity.

    Attributes:
        pattern: As text.
        scope: Where weights compete.
        sparsity: The share of the weights that the pattern removes.
        perplexity: Perplexity of the best that was found, as it was confirmed.
        dense: Perplexity of the dense model, on the same windows.
        wanda, ria: Perplexities of these methods on the same windows; None where one gives NaN.
        proxy: The objective's value of the best.
        trials: Trials of its search.
        seconds: What search, confirmation and published methods took, interruptions left out.
        result: Result of the search.
    """

    pattern: str
    scope: str
    sparsity: float
    perplexity: float
    dense: float
    wanda: float | None
    ria: float | None
    proxy: float
    trials: int
    seconds: float
    result: SearchResult

    @property
    def rise(self) -> float:
        """Rise of the perplexity over the dense model's, as a share of that."""
        return self.perplexity / self.dense - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the configuration among them."""
        names = (
            "pattern", "scope", "sparsity", "perplexity", "rise", "dense", "wanda", "ria", "proxy",
            "trials", "seconds",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "study": self.result.study_name,
            "trial": self.result.trial,
            "configuration": self.result.configuration.model_dump(mode="json"),
            "warnings": self.result.warnings,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CurvePoint":
        """What :meth:`to_dict` gave."""
        names = {each.name for each in fields(cls)} - {"result"}
        found = Configuration.model_validate(values["configuration"])
        result = SearchResult(
            configuration=found,
            study_name=values["study"],
            trial=values["trial"],
            warnings=[*values["warnings"]],
        )
        return cls(**{name: values[name] for name in names}, result=result)


class CurvePoints:
    """
    Finds points one after the other; what the studies hold is not done again.

    Args:
        subject: The model, its bundle, and the text that all perplexities are of.
        record: Opens the study of a search.
        pareto: Study of (sparsity, objective) that takes the trials of each point.
        run: Where it runs, and who watches it.
        dense: The dense model's perplexity on that text, if it is known.
        search: How each is searched, as :func:`search_job` says.
    """

    def __init__(
        self,
        subject: Subject,
        record: Record,
        *,
        pareto: optuna.Study | None = None,
        run: Run = Run(),
        dense: float | None = None,
        search: IslandSearch | None = None,
    ) -> None:
        self._subject, self._record, self._pareto = subject, record, pareto
        self._run, self._dense, self._search = run, dense, search

    def find(self, request: SearchRequest, title: str) -> CurvePoint:
        """
        Search, confirm, and measure the published methods beside.

        Args:
            request: Request of the search, its pattern included.
            title: Title of the point, for whoever is told of the progress.

        Raises:
            InvalidInput, NumericalError, StudyError: As :func:`search_job`.
        """
        subject = self._subject
        with self._record(request) as study:
            if self._dense is not None:  # as another search has measured it on these windows
                about = {"text_sha256": subject.text.key}
                once(study, "reference:dense", about, lambda: {"perplexity": self._dense})
            with _timed(study, request, subject.text.key) as seconds:
                result = search_job(
                    request,
                    subject.bundle,
                    study=study,
                    model=subject.model,
                    confirm_text=subject.text,
                    calibration=subject.calibration,
                    search=self._search,
                    run=_titled(self._run, title),
                )
            if self._pareto is not None:
                pattern = request.pattern
                add_point(self._pareto, study, pattern.sparsity, str(pattern), self._run.fence)
        found = result.configuration
        assert found.perplexities is not None  # there is a text
        self._dense = found.perplexities.dense
        return CurvePoint(
            pattern=found.pattern,
            scope=request.pattern.scope.value,
            sparsity=request.pattern.sparsity,
            perplexity=found.perplexities.pruned,
            dense=found.perplexities.dense,
            wanda=found.perplexities.wanda,
            ria=found.perplexities.ria,
            proxy=found.objective["value"],
            trials=request.trials,
            seconds=seconds(),
            result=result,
        )


def find_points(points: CurvePoints, requests: Sequence[SearchRequest]) -> list[CurvePoint]:
    """A point for each request, in their order."""
    count = len(requests)
    return [
        points.find(request, f"{request.pattern}, {number} of {count}")
        for number, request in enumerate(requests, 1)
    ]


@contextmanager
def opened_pareto(
    url: str, requests: Sequence[SearchRequest], subject: Subject
) -> Iterator[optuna.Study]:
    """
    Open the study of (sparsity, objective) that takes the trials of some searches.

    Args:
        url: URL of the database of their studies.
        requests: Requests of the searches.
        subject: What is searched.

    Raises:
        StudyError: It cannot be opened, or fails in the ``with`` block.
    """
    try:
        with open_storage(url) as storage:
            yield pareto_of(requests, subject, storage)
    except StorageError as error:
        raise StudyError(f"--study {url}: {error}") from error


def pareto_of(
    requests: Sequence[SearchRequest], subject: Subject, storage: BaseStorage | None
) -> optuna.Study:
    """The same in a storage that is open, or in memory."""
    names = [name_of_study(each, subject.bundle, subject.text) for each in requests]
    model = Path(subject.model.name).name
    objective = requests[0].objective
    return pareto_study(pareto_name(model, names), objective.direction, objective.label, storage)


def curve_document(
    points: Sequence[CurvePoint],
    subject: Subject,
    *,
    seconds: float | None,
    study: Mapping[str, Any],
) -> dict[str, Any]:
    """
    A curve as JSON values.

    Args:
        points: Its points.
        subject: What was searched.
        seconds: Duration of the calibration; None if there was one already.
        study: What is said of the study that has the trials of all points.
    """
    text = subject.text
    return {
        "format": FORMAT,
        "version": 1,
        "model": dict(subject.bundle.provenance.get("model", {})),
        "dense": points[0].dense,
        "confirmation": {**text.measured_on(), "text_sha256": text.key},
        "calibration": {"key": subject.bundle.key, "seconds": seconds},
        "study": dict(study),
        "points": [each.to_dict() for each in points],
    }


def point_warnings(points: Sequence[CurvePoint]) -> list[str]:
    """The warnings of all searches, each with the patterns that it is of."""
    by_text: dict[str, list[str]] = {}
    for each in points:
        for warning in each.result.warnings:
            by_text.setdefault(warning, []).append(each.pattern)
    return [f"({', '.join(patterns)}) {text}" for text, patterns in by_text.items()]


def check_patterns(model: LanguageModel, patterns: Sequence[Pattern], linears: Linears) -> None:
    """
    See before any long work that all patterns fit a model.

    Raises:
        InvalidInput: N:M does not divide an input width, or what is said of single linears does
            not fit the model; names the linear.
    """
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
    """
    Keep in a study what its point takes; what is interrupted adds up.

    Yields:
        What gives the seconds, at the end.
    """
    of = [request.trials, request.finalists, text_sha256]
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
