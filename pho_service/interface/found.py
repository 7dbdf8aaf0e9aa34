"""
`pho.search`: what a search found, with its study and a table.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.interface.asked import (
    Asked,
    Given,
    Patterns,
    Sparsities,
    check_study_is_of,
    given_bundles,
    given_linears,
)
from pho_service.interface.models import (
    Choice,
    Model,
    check_dense,
    check_prefix,
    opened,
    proxy_device,
)
from pho_service.interface.texts import calibration_windows, confirmation_text
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.objectives import only_one
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import (
    Bundles,
    memory_study,
    opened_study,
    search_job,
)
from pho_service.pipeline.studies import check_study_url
from pho_service.progress import Progress, bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.shown.parts import Shown, Table
from pho_service.shown.report import Report
from pho_service.shown.tables import configuration_rows, results_table
from pho_service.spec.configuration import Configuration, write_configuration
from pho_service.spec.objective import Objective, ObjectiveName, Over, Weighting
from pho_service.spec.pattern import Pattern
from pho_service.spec.perplexities import REFERENCES, Perplexities
from pho_service.spec.presets import DEFAULT_PRESET
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import Callback
from storage.studies import note_trial

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from pho_service.interface.texts import Texts

_ASKED = SearchRequest(pattern=Pattern(sparsity=0.5))  # for its defaults
_OBJECTIVE = Objective()
CONFIRM_WINDOWS = 16


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


def search(
    bundle: Given | Mapping[str, Given],
    pattern: str | float | Pattern,
    *,
    model: Model | None = None,
    tokenizer: Any = None,
    confirm: "Texts | None" = None,
    texts: "Texts | None" = None,
    scope: str | None = None,
    preset: str = DEFAULT_PRESET,
    objective: ObjectiveName = _OBJECTIVE.name,
    weighting: Weighting = _OBJECTIVE.weighting,
    over: Over | None = None,
    space: Mapping[str, Any] | None = None,
    steps: Mapping[str, Any] | None = None,
    targets: Patterns = (),
    ignore: Patterns = (),
    sparsities: Sparsities | None = None,
    sampler: "str | BaseSampler" = _ASKED.sampler,
    trials: int = _ASKED.trials,
    seed: int = _ASKED.seed,
    finalists: int = _ASKED.finalists,
    corrections: int = _ASKED.corrections,
    validate: int | None = None,
    confirm_windows: int = CONFIRM_WINDOWS,
    warm_start: Sequence[Choice] = (),
    compare_cold: bool = _ASKED.compare_cold,
    study: optuna.Study | str | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> Found:
    """
    Find the best coefficients for a model, and confirm them by perplexity.

    The model is left dense. The same bundle, texts, options and seed give the configuration of
    `pho search`, byte for byte. ``found.perplexities`` says how good the result is: beside the
    finalists the dense model, Wanda and RIA are measured.

    Args:
        bundle: What ``pho.calibrate`` gave, or the path of its file; several by the names of
            their models for coefficients that are good on all of them.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        model: That of the bundle, in memory or by its name. Without it nothing is confirmed.
        tokenizer: Its own; not needed with a bundle that ``pho.calibrate`` gave.
        confirm: Text for the final perplexities. Without it, windows of the calibration's text
            are used that were held out.
        texts: The calibration's text, for steps that run it through the model; not needed with a
            bundle that ``pho.calibrate`` gave.
        scope: Where weights compete: ``row``, ``layer`` or ``global``; None is ``layer``, and
            ``row`` for N:M.
        preset: ``score``, ``crepe``, ``crepe-plus`` or ``best``.
        objective: ``activation-reconstruction``, ``gini`` or ``perplexity``.
        weighting: How activation reconstruction adds up the errors: ``blend``,
            ``geometric``, ``fisher``, ``relative`` or ``absolute``.
        over: How several models count: ``mean`` or ``worst``.
        space: Bounds of the search by name, ``{"row_share": (0.2, 0.8), "kernel_sizes": (3, 5)}``;
            one number fixes a value.
        steps: What every candidate goes through, where it is not the preset's:
            ``{"allocation": "owl", "permutation": ..., "repruning": ..., "update": ...,
            "shrinkage": 1.0, "reconstruction": "block"}``.
        targets: Linears to prune, all by default: names, globs (``*.down_proj``), or regular
            expressions after ``re:``.
        ignore: Linears that stay dense, in the same form; they come before ``targets``.
        sparsities: Linears with a sparsity of their own, by the same patterns:
            ``{"*.layers.0.*": 0.3}``; for N:M the N to keep of the same M.
        sampler: A name (``cmaes``, ``tpe``, ``random``, ``qmc``, ``gp``, ``hill-climb``), or a
            sampler of Optuna.
        trials: How many, baselines included.
        seed: Seed of a sampler that is given by its name.
        finalists: How many found candidates are looked at again, beside the baselines.
        corrections: How many allocations are compared with the dense model, on calibration
            windows, to correct the best one where the proxy is wrong; needs the model.
        validate: Random candidates, 8 or more, that the proxy is validated on by perplexity before
            the confirmation: where it does not rank, four times as many finalists are looked at.
        confirm_windows: Windows of the text for the final perplexities.
        warm_start: What was found elsewhere in the same pattern and scope: rated first.
        compare_cold: Whether the same search is run without the warm start, too.
        study: The record: one of Optuna, or the URL of a database, is gone on with. None: a new
            one in memory.
        callbacks: As Optuna's: called with the study and a frozen trial after each new trial.
        progress: Show bars on stderr.

    Raises:
        InvalidInput: An option breaks a rule, a pattern matches no linear, or a text is given
            without the model.
        ModelError: The model has been pruned already, or the tokenizer is of another model.
        BundleError: The bundle is of another model.
        TextError: A text cannot be read, or does not fill one window.
        StudyError: The study is of another search or of another bundle, or cannot be opened.
    """
    bundles = given_bundles(bundle)
    count = len(bundles) if isinstance(bundles, Mapping) else 1
    asked = Asked(
        pattern=pattern, scope=scope, preset=preset, objective=objective, weighting=weighting,
        over=over, space=space, steps=steps, linears=given_linears(targets, ignore, sparsities),
    )  # fmt: skip
    request = asked.request(
        bundles=count, sampler=sampler, trials=trials, seed=seed, finalists=finalists,
        warm_start=warm_start, compare_cold=compare_cold, corrections=corrections,
        validate=validate,
    )  # fmt: skip
    if isinstance(study, str):
        check_study_url(study)
    elif study is not None:
        check_study_is_of(study, bundles, request)
    measured = None
    if model is not None:
        measured = _Measured.of(
            only_one(bundles, "a model") if isinstance(bundles, Mapping) else bundles,
            model, tokenizer, confirm, texts, confirm_windows,
        )  # fmt: skip
    elif confirm is not None or texts is not None:
        raise InvalidInput(
            "a text is given, but no perplexity can be measured without the model. Give model=, "
            "too, or leave the text out."
        )
    return _searched(request, bundles, study, measured, callbacks, bars(progress))


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What finalists are measured with."""

    model: LanguageModel
    bundle: ProxyBundle
    text: ReportText | None
    calibration: Tensor | None

    @classmethod
    def of(
        cls,
        bundle: ProxyBundle,
        model: Model,
        tokenizer: Any,
        confirm: "Texts | None",
        texts: "Texts | None",
        windows: int,
    ) -> "_Measured":
        loaded = opened(model, tokenizer or getattr(bundle, "tokenizer", None))
        check_dense(loaded, bundle)
        check_prefix(loaded, bundle)
        calibration = calibration_windows(loaded, bundle, texts)
        text = confirmation_text(loaded, bundle, confirm, calibration, windows)
        return cls(model=loaded, bundle=bundle, text=text, calibration=calibration)


def _searched(
    request: SearchRequest,
    bundles: Bundles,
    study: optuna.Study | str | None,
    measured: _Measured | None,
    callbacks: Sequence[Callback],
    progress: Progress,
) -> Found:
    text = measured.text if measured else None
    model = measured.model if measured else None
    record: AbstractContextManager[optuna.Study]
    if isinstance(study, str):
        record = opened_study(study, request, bundles, text)
    else:
        record = nullcontext(study or memory_study(request, bundles, text))
    with record as kept:
        result = search_job(
            request,
            bundles,
            study=kept,
            model=model,
            confirm_text=text,
            calibration=measured.calibration if measured else None,
            device=proxy_device(model),
            callbacks=callbacks,
            progress=progress,
        )
        _note_ratings(kept, result.configuration)
    parts = {part.name: getattr(result, part.name) for part in fields(SearchResult)}
    table = _table(result.configuration, result.trial)
    return Found(**parts, study=kept, table=table)


def _note_ratings(study: optuna.Study, found: Configuration) -> None:
    """
    Give the trials what was measured of them, where it does not stand there.

    That is so where perplexity is the objective, and in studies of an older version.
    """
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
