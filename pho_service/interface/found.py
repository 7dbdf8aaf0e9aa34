"""
`pho.search`: what a search found, with its study and a table.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.samplers import BaseSampler

from pho_service.errors import InvalidInput
from pho_service.interface.asked import (
    Given,
    SearchArguments,
    arguments,
    check_study_is_of,
    given_bundles,
    validation_of,
)
from pho_service.interface.models import (
    Choice,
    Model,
    chosen,
    run_on,
)
from pho_service.interface.texts import (
    calibrated,
    opened_for,
)
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.objectives import only_one
from pho_service.pipeline.search import (
    Bundles,
    by_name,
    memory_study,
    opened_study,
    search_job,
)
from pho_service.pipeline.studies import check_study_url
from pho_service.shown.parts import Shown, Table
from pho_service.shown.report import Report
from pho_service.shown.tables import configuration_rows, results_table
from pho_service.spec.configuration import Configuration, write_configuration
from pho_service.spec.objective import Over
from pho_service.spec.pattern import Pattern
from pho_service.spec.perplexities import REFERENCES, Perplexities
from pho_service.spec.samplers import Sampler
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import Callback
from storage.studies import note_trial

if TYPE_CHECKING:
    pass

_ASKED = SearchRequest(pattern=Pattern(sparsity=0.5))  # for its defaults


@dataclass(frozen=True, kw_only=True)
class FoundRow:
    """
    A line of the table of a search; all perplexities are of one text.

    Attributes:
        method: ``dense``, ``wanda``, ``ria``, or a finalist's method.
        trial: Number of the finalist's trial; None for the others.
        perplexity: None where it was not measured.
        divergence: Mean Kullback-Leibler divergence from the dense model, in nats; None where it
            was not measured.
        proxy: The objective's value; None where the study has none.
    """

    method: str
    trial: int | None = None
    perplexity: float | None = None
    divergence: float | None = None
    proxy: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Found(Shown, SearchResult):
    """
    Result of a search.

    Attributes:
        study: The record of the search.
        table: Dense, Wanda, RIA and the finalists; ``pandas.DataFrame(found.table)`` takes it.
    """

    study: optuna.Study
    table: Sequence[FoundRow]

    @property
    def perplexities(self) -> Perplexities | None:
        """
        How good the result is: ``dense``, ``pruned``, ``wanda``, ``ria`` and the ``rise``.

        None where no perplexity was measured; as text it is one line.
        """
        return self.configuration.perplexities

    def write(self, path: str | Path) -> None:
        """
        Write the config.json that `pho search` writes.

        Raises:
            OutputError: The file cannot be written.
        """
        write_configuration(self.configuration, Path(path))

    def _shown(self) -> Table:
        found = self.configuration
        table = results_table(Report.of(found))
        assert table is not None  # it has its own trial
        lines = [(name, value) for name, value in configuration_rows(found) if value]
        good = "" if found.perplexities is None else f"perplexity: {found.perplexities}\n"
        return replace(
            table,
            title=f"{good}trial {self.trial} of study {self.study_name!r}",
            notes=(
                *(f"{name}: {value}" if name else value for name, value in lines),
                *table.notes,
                *(f"Note: {warning}" for warning in self.warnings),
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundArguments(SearchArguments):
    """
    Arguments of ``pho.search``.

    Attributes:
        bundle: What ``pho.calibrate`` gave, or the path of its file; several by the names of
            their models for coefficients that are good on all of them.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        model: That of the bundle, in memory or by its name. Without it nothing is confirmed.
        over: How several models count: their ``mean``, or the ``worst``.
        sampler: Its name, or a sampler of Optuna, which has a seed of its own.
        finalists: How many found candidates are looked at again, beside the baselines.
        validate: Random candidates, 8 or more, that the proxy is validated on by perplexity before
            the confirmation: where it does not rank, four times as many finalists are looked at.
        warm_start: What was found elsewhere in the same pattern and scope: rated first.
        study: The record: one of Optuna, or the URL of a database, is gone on with. None: a new
            one in memory.
        callbacks: As Optuna's: called with the study and a frozen trial after each new trial.
    """

    bundle: Given | Mapping[str, Given] = field(kw_only=False)
    pattern: str | float | Pattern = field(kw_only=False)
    model: Model | None = None
    over: Over | None = None
    sampler: Sampler | BaseSampler = "cmaes"
    finalists: int = _ASKED.finalists
    validate: int | None = None
    warm_start: Sequence[Choice] = ()
    study: optuna.Study | str | None = None
    callbacks: Sequence[Callback] = ()


@arguments(FoundArguments)
def search(asked: FoundArguments) -> Found:
    """
    Find the best coefficients for a model, and confirm them by perplexity.

    The model is left dense. The same bundle, texts, options and seed give the configuration of
    `pho search`, byte for byte. ``found.perplexities`` says how good the result is: beside the
    finalists the dense model, Wanda and RIA are measured.

    Raises:
        InvalidInput: An option breaks a rule, a pattern matches no linear, or a text is given
            without the model.
        ModelError: The model has been pruned already, or the tokenizer is of another model.
        BundleError: The bundle is of another model.
        TextError: A text cannot be read, or does not fill one window.
        StudyError: The study is of another search or of another bundle, or cannot be opened.
    """
    bundles, study = given_bundles(asked.bundle), asked.study
    request = asked.request(
        asked.pattern,
        bundles=len(bundles) if isinstance(bundles, Mapping) else 1,
        over=asked.over,
        sampler=asked.sampler,
        finalists=asked.finalists,
        warm_start=tuple(chosen(each).candidate() for each in asked.warm_start),
        validation=validation_of(asked.validate),
    )
    if isinstance(study, str):
        check_study_url(study)
    elif study is not None:
        check_study_is_of(study, bundles, request)
    named = by_name(bundles)
    known = Calibrated(bundle=next(iter(named.values())))
    if asked.model is not None:
        taken = only_one(named, "a model")
        loaded = opened_for(taken, asked.model, asked.tokenizer)
        known = calibrated(loaded, taken, asked.texts, asked.confirm, asked.confirm_windows)
    elif asked.confirm is not None or asked.texts is not None:
        raise InvalidInput(
            "a text is given, but no perplexity can be measured without the model. Give model=, "
            "too, or leave the text out."
        )
    return _searched(request, bundles, study, known, asked.callbacks, asked.progress)


def _searched(
    request: SearchRequest,
    bundles: Bundles,
    study: optuna.Study | str | None,
    known: Calibrated,
    callbacks: Sequence[Callback],
    progress: bool,
) -> Found:
    record: AbstractContextManager[optuna.Study]
    if isinstance(study, str):
        record = opened_study(study, request, bundles, known.confirm)
    else:
        record = nullcontext(study or memory_study(request, bundles, known.confirm))
    with record as kept:
        result = search_job(
            request,
            bundles,
            study=kept,
            model=known.model,
            confirm_text=known.confirm,
            calibration=known.calibration,
            run=run_on(known.model, progress),
            callbacks=callbacks,
        )
        _note_ratings(kept, result.configuration)
    parts = {part.name: getattr(result, part.name) for part in fields(SearchResult)}
    table = _table(result.configuration, result.trial)
    return Found(**parts, study=kept, table=table)


def _note_ratings(study: optuna.Study, found: Configuration) -> None:
    """Give trials that were searched by perplexity what was measured of them."""
    trials = study.get_trials(deepcopy=False)
    for rating in found.candidates:
        for what in ("perplexity", "divergence"):
            value = getattr(rating, what)
            if value is not None and trials[rating.trial].user_attrs.get(what) != value:
                note_trial(study, rating.trial, what, value)


def _table(found: Configuration, trial: int) -> list[FoundRow]:
    """The references, and every finalist; where nothing was measured, the baselines instead."""
    ratings, good = found.candidates, found.perplexities
    references = [
        FoundRow(method=name, perplexity=getattr(good, name)) for name in REFERENCES if good
    ]
    if not ratings:
        best = [FoundRow(method=found.method, trial=trial, proxy=found.objective["value"])]
        baselines = [each for each in found.baselines if each.trial != trial]
    else:
        best, baselines = [], []
    return [
        *references,
        *(
            FoundRow(
                method=each.method,
                trial=each.trial,
                perplexity=each.perplexity,
                divergence=each.divergence,
                proxy=each.proxy,
            )
            for each in [*baselines, *ratings]
        ),
        *best,
    ]
